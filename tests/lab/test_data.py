"""The corpus: nothing lost, nothing leaked to the held-out side, the same batches every time."""

from pathlib import Path

import jax
import numpy as np
import pytest

from mode.lab.data import (
    DOCUMENT_START,
    Batch,
    Sequences,
    batches,
    held_out_batches,
    read_corpus,
    read_documents,
)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """Thirty files of different lengths; each repeats its own number."""
    folder = tmp_path / "texts" / "deep"
    folder.mkdir(parents=True)
    for number in range(30):
        (folder / f"{number:02}.txt").write_bytes(bytes([65 + number]) * (20 + 7 * number))
    return str(tmp_path / "texts" / "**" / "*.txt")


def test_every_byte_is_a_target_once(texts: str) -> None:
    documents = read_corpus(texts, length=64).train
    source = Sequences(documents, 64)
    samples = [source[place] for place in range(len(source))]
    batch = Batch.of({name: np.stack([s[name] for s in samples]) for name in samples[0]})
    counted = np.asarray(batch.targets)[np.asarray(batch.weights) > 0]
    expected = documents.tokens[documents.tokens != DOCUMENT_START]
    np.testing.assert_array_equal(counted, expected)


def test_segments_and_positions(texts: str) -> None:
    documents = read_corpus(texts, length=64).train
    source = Sequences(documents, 64)
    samples = [source[place] for place in range(len(source))]
    batch = Batch.of({name: np.stack([s[name] for s in samples]) for name in samples[0]})
    tokens, info = np.asarray(batch.inputs), batch.info
    segments, positions = np.asarray(info.segment_ids), np.asarray(info.positions)
    for row in range(len(tokens)):
        real = segments[row] > 0
        assert np.all(segments[row][real][:1] == 1)
        for segment in range(1, segments[row].max() + 1):
            inside = segments[row] == segment
            np.testing.assert_array_equal(positions[row][inside], np.arange(inside.sum()))
            assert len(set(tokens[row][inside]) - {DOCUMENT_START}) <= 1
            if segment > 1:
                assert tokens[row][inside][0] == DOCUMENT_START
    assert np.all(segments[:-1] > 0), "only the last sequence may hold padding"
    assert np.any(segments[-1] == 0)
    assert np.all(np.asarray(batch.weights)[segments == 0] == 0)


def test_no_target_crosses_into_another_document(texts: str) -> None:
    documents = read_corpus(texts, length=64).train
    sample = next(batches(documents, length=64, batch=8, seed=0))
    batch = Batch.of(sample)
    counted = np.asarray(batch.weights) > 0
    assert np.all(np.asarray(batch.targets)[counted] != DOCUMENT_START)
    same = sample["segment_ids"][:, 1:] == sample["segment_ids"][:, :-1]
    np.testing.assert_array_equal(counted, same & (sample["segment_ids"][:, 1:] > 0))


def test_held_out_files_are_apart_and_stay_so(texts: str, tmp_path: Path) -> None:
    before = read_corpus(texts, length=64)
    assert before.train.names
    assert before.held_out.names
    assert not set(before.train.names) & set(before.held_out.names)
    assert len(before.train.names) + len(before.held_out.names) == 30
    (tmp_path / "texts" / "one-more.txt").write_bytes(b"z" * 99)
    after = read_corpus(texts, length=64)
    assert set(before.train.names) - set(after.held_out.names) == set(before.train.names)
    assert before.fingerprint != after.fingerprint


def test_the_default_is_the_standard_library() -> None:
    corpus = read_corpus(None, length=128)
    names = {*corpus.train.names, *corpus.held_out.names}
    assert "argparse.py" in names
    assert not any("site-packages" in name or name.startswith("test/") for name in names)
    fraction = len(corpus.held_out.tokens) / len(corpus.train.tokens)
    assert 0.02 < fraction < 0.3
    assert corpus.fingerprint == read_corpus(None, length=128).fingerprint


def test_one_file_is_held_out_from_its_end(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(bytes(range(32, 122)) * 20)
    corpus = read_corpus(str(tmp_path / "book.txt"), length=64)
    both = np.concatenate([corpus.train.tokens[1:], corpus.held_out.tokens[1:]])
    assert both.astype(np.uint8).tobytes() == (tmp_path / "book.txt").read_bytes()
    assert len(corpus.held_out.tokens) == 181


def test_shuffling_is_repeatable_and_covers_an_epoch(texts: str) -> None:
    documents = read_corpus(texts, length=32).train

    def starts(seed: int, steps: int) -> list[bytes]:
        stream = batches(documents, length=32, batch=4, seed=seed)
        return [next(stream)["tokens"].tobytes() for _ in range(steps)]

    steps = len(Sequences(documents, 32)) // 4
    assert starts(0, 2 * steps) == starts(0, 2 * steps)
    assert starts(0, steps) != starts(1, steps)
    assert starts(0, 2 * steps)[:steps] != starts(0, 2 * steps)[steps:]
    stream = batches(documents, length=32, batch=1, seed=0)
    source = Sequences(documents, 32)
    seen = sorted(next(stream)["tokens"].tobytes() for _ in range(len(source)))
    assert seen == sorted(source[place]["tokens"].tobytes() for place in range(len(source)))


def test_iterator_state_is_restored(texts: str) -> None:
    documents = read_corpus(texts, length=32).train
    stream = batches(documents, length=32, batch=4, seed=3)
    for _ in range(5):
        next(stream)
    state = stream.get_state()
    expected = [next(stream) for _ in range(40)]
    fresh = batches(documents, length=32, batch=4, seed=3)
    fresh.set_state(state)
    for want in expected:
        got = next(fresh)
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_held_out_batches_are_whole_and_fixed(texts: str) -> None:
    documents = read_corpus(texts, length=16).held_out
    first, again = (held_out_batches(documents, length=16, batch=3, sequences=8) for _ in range(2))
    assert len(first) == 2
    assert all(sample["tokens"].shape == (3, 17) for sample in first)
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_fewer_sequences_than_a_batch_are_evaluated_once(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(np.random.default_rng(0).bytes(4000))
    documents = read_corpus(str(tmp_path / "book.txt"), length=16).held_out
    for sequences in (1, 5):
        (sample,) = held_out_batches(documents, length=16, batch=16, sequences=sequences)
        real = sample["segment_ids"].any(axis=1)
        assert real.sum() == sequences
        assert len(np.unique(sample["tokens"][real], axis=0)) == sequences
        assert not Batch.of({name: rows[~real] for name, rows in sample.items()}).weights.any()


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("**/*.txt", {"a/1.txt", "a/2.txt", "copy.txt", "only.txt"}),
        ("*.txt", {"copy.txt", "only.txt"}),
        ("b/*.txt", {"1.txt", "2.txt"}),
        ("?/**", {"a/1.txt", "a/2.txt"}),
        ("[ab]/1.*", {"a/1.txt"}),
        ("a/[1].txt", {"[1].txt"}),
    ],
)
def test_every_file_is_read_once(tmp_path: Path, glob: str, names: set[str]) -> None:
    """Links to folders, to the folder above, twice, and to a file outside."""
    (tmp_path / "corpus" / "a").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for path in ("corpus/a/1.txt", "corpus/a/2.txt", "corpus/copy.txt", "outside/3.txt"):
        (tmp_path / path).write_text(f"the text of {path}" * 9)
    (tmp_path / "corpus" / "b").symlink_to("a")
    (tmp_path / "corpus" / "a" / "up").symlink_to("..")
    (tmp_path / "corpus" / "a" / "again").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "only.txt").symlink_to("../outside/3.txt")
    if "[1]" in glob:
        (tmp_path / "corpus" / "a" / "[1].txt").write_text("a name that looks like a glob" * 9)
    documents = read_documents(str(tmp_path / "corpus" / glob))
    assert set(documents.names) == names


def test_equal_content_is_on_one_side(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"the text of {number // 2}" * 30)
    corpus = read_corpus(str(tmp_path / "*.txt"), length=16)
    sides = [
        {int(name.removesuffix(".txt")) // 2 for name in side.names}
        for side in (corpus.train, corpus.held_out)
    ]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_a_glob_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`data` must match at least one file.*nothing.*Quote"):
        read_corpus(str(tmp_path / "nothing*.txt"), length=64)


def test_files_too_small_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"`data` must fill .*length=64.* 15 bytes.*smaller `len"):
        read_corpus(str(tmp_path / "*.txt"), length=64)
    (tmp_path / "empty.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="`data` must match at least one file"):
        read_corpus(str(tmp_path / "*.bin"), length=64)
