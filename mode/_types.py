"""The array types that most signatures share, and their axes.

One alphabet everywhere. Tokens compete for slots inside their group (`groups` are leading axes);
`choices` are the experts, then the no-op experts. Others: `heads kv_heads head_dim vocab layers`.
"""

from collections.abc import Callable

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


Hidden = Float[Array, "*groups tokens dim"]
Logits = Float[Array, "*groups tokens choices"]  # of the router
ExpertLogits = Float[Array, "*groups tokens experts"]  # and weights: the same without no-ops
ExpertMask = Bool[Array, "*groups tokens experts"]
TokenMask = Bool[Array, "*groups tokens"]
SlotIndex = Int[Array, "*groups experts slots"]
Slots = Float[Array, "experts *groups slots dim"]  # tokens in their slots, experts first
Gathered = Float[Array, "*groups slots dim"]  # tokens in the slots of a router of one choice
GatheredIds = Int[Array, "*groups slots"]
Ids = Int[Array, "*groups tokens"]
Load = Int[Array, "*groups choices"]
Count = Int[Array, "*groups"]
Scalar = Float[Array, ""]
Sequences = Int[Array, " batch"]  # one number per sequence
Key = PRNGKeyArray | None
Vector = Float[Array, " dim"]
VectorMap = Callable[[Vector], Vector]
# Of attention. The query heads that share a key-value head are stacked as rows of one matrix.
Queries = Float[Array, "batch queries heads head_dim"]
QueryIndex = Int[Array, "batch queries"]
Keys = Float[Array, "batch tokens kv_heads head_dim"]  # and values
Rows = Float[Array, "batch kv_heads rows head_dim"]
KeyRows = Float[Array, "batch kv_heads keys head_dim"]
Scores = Float[Array, "batch kv_heads rows keys"]
