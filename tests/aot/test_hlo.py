"""Collectives are read off the text of programs, as XLA's backends print them."""

from mode.aot._hlo import parse_collectives


TEXT = """
  %a = f32[8,4]{1,0} all-gather(%x), metadata={op_name="jit(f)/mode.Router/top_k"}
  %b = (bf16[2,4]{1,0}, bf16[2,4]{1,0}) all-to-all(%y, %z), channel_id=1
  %c = (f32[2]{0}, f32[8]{0}) all-gather-start(%w), channel_id=2
  %d = f32[8]{0} all-gather-done(%c)
  %e = f32[2]{0} add(%u, %v), metadata={op_name="an all-reduce( in a name"}
"""


def test_collectives_are_read_off_the_program() -> None:
    collectives = parse_collectives(TEXT)
    assert [(one.kind, one.bytes) for one in collectives] == [
        ("all-gather", 128),
        ("all-to-all", 32),
        ("all-gather", 32),
    ]
    assert collectives[0].name == "jit(f)/mode.Router/top_k"


LOOP = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = f32[8]{0} all-gather(%x), channel_id=1
  %b = f32[8]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %w = (s32[], f32[8]) while(%q), condition=%inner_condition, body=%inner
}
%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = f32[8]{0} all-to-all(%x), channel_id=4
}
%piece (p: f32[8]) -> f32[8] {
  %a.1 = f32[8]{0} all-gather(%x), channel_id=1
}
%all-reduce-scatter.1 (p: f32[8]) -> f32[4] {
  %r = f32[8]{0} all-reduce(%p), channel_id=2, to_apply=%add
}
%condition (p: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(20)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%inner_condition (p: (s32[], f32[8])) -> pred[] {
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=2
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%condition, body=%body
  %g = f32[8]{0} fusion(%x), kind=kCustom, calls=%piece
  ROOT %e = f32[8]{0} all-reduce(%w), channel_id=3, to_apply=%add
}
"""


def test_loops_multiply_collectives_and_parts_are_one() -> None:
    """A loop up to a constant multiplies; of a loop to another bound the number is not known."""
    assert [(one.kind, one.times) for one in parse_collectives(LOOP)] == [
        ("all-gather", 20),
        ("all-to-all", None),
        ("reduce-scatter", 20),
        ("all-reduce", 1),
    ]


def test_the_trip_count_of_the_compiler_counts() -> None:
    """CPU programs compare inside of a fusion, where the bound is not to be read."""
    known = 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    text = LOOP.replace("body=%body", known).replace("constant(20)", "parameter(1)")
    assert parse_collectives(text)[0].times == 7
