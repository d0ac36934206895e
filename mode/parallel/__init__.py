"""Sharding over a mesh of devices: rules that a user gives, and constraints inside layers.

A mesh may have two axes that this library knows by name:

- `data`: the batch is sharded over it, and so are the parameters (fully sharded data parallelism);
- `expert`: experts are sharded over it. The batch is too, or devices along this axis would
  duplicate the work of the layers without experts.

Modules name the roles of their arrays by `role_field`; `named_shardings` looks up a `ShardingRule`
for each. XLA's partitioner derives the sharding of everything in between.
"""

from ._kinds import parameter_kinds as parameter_kinds
from ._roles import ArrayRoles as ArrayRoles, array_roles as array_roles, role_field as role_field
from ._sharding import (
    BATCH_RULES as BATCH_RULES,
    DECODE_RULES as DECODE_RULES,
    PARAMETER_RULES as PARAMETER_RULES,
    Rules as Rules,
    ShardingRule as ShardingRule,
    all_gather_parameters as all_gather_parameters,
    map_batch as map_batch,
    named_shardings as named_shardings,
    shard_batch as shard_batch,
    to_experts as to_experts,
    to_groups as to_groups,
)
