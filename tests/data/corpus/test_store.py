from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kd_lightning.data.corpus import store as module
from kd_lightning.data.corpus.store import Source, TextEncoder, encode_corpus, encode_documents, open_corpus
from kd_lightning.data.text.tokens import load_tokenizer
from kd_lightning.runtime.errors import DataError, KDError
from tests.data.corpus.texts import made, source, stored


def test_documents_are_read_back_as_they_were_encoded(tmp_path: Path) -> None:
    texts = made(30)
    store, tokenizer = stored(texts, tmp_path)
    for number, text in enumerate(texts):
        ids = store.tokens[store.offsets[number] : store.offsets[number + 1]].tolist()
        assert ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert tokenizer.decode(ids[:-1]) == text
    assert store.tokens.dtype == np.uint16
    assert store.counts == {"train": 30}


def test_a_document_that_ends_already_gets_no_second_end(tmp_path: Path) -> None:
    texts = ["one two three<|endoftext|>", "four five six"]
    store, tokenizer = stored(texts, tmp_path)
    assert [int((store.tokens == tokenizer.eos_token_id).sum()), len(store)] == [2, 2]


def test_bytes_of_the_tokens_add_up_to_the_texts(tmp_path: Path) -> None:
    texts = ["plain text", "Grüße, 東京 😀 und €", "  spaces \n\n before and after  ", "é" * 40]
    store, _ = stored(texts, tmp_path)
    widths = [store.widths[a:b] for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True)]
    assert [int(each.sum()) for each in widths] == [len(text.encode()) for text in texts]
    assert all(each[-1] == 0 for each in widths)  # the end of a text is no text


def test_bytes_of_a_tokenizer_that_leaves_things_out_add_up_too() -> None:
    texts = ["Ärger  und\n\nFreude ", "plain words here"]
    tokenizer = load_tokenizer("wordpiece:60", texts)
    for text, (ids, widths, _) in zip(texts, encode_documents(tokenizer, texts, tokenizer.sep_token_id), strict=True):
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert widths.sum() == len(text.encode())
        assert widths[0] == 0


def test_the_cache_is_named_after_text_tokenizer_and_end(tmp_path: Path) -> None:
    texts = made(6)
    found, _ = stored(texts, tmp_path)
    assert stored(texts, tmp_path)[0].folder == found.folder
    other_texts, other_end = stored([*texts[:-1], "another"], tmp_path)[0], stored(texts, tmp_path, end=False)[0]
    assert len({found.folder, other_texts.folder, other_end.folder}) == 3


@pytest.mark.parametrize("name", module.FILES)
def test_a_damaged_file_is_written_anew(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    texts = made(6)
    store, tokenizer = stored(texts, tmp_path)
    path = store.folder / name
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(KDError, match=f"{name} is damaged"):
        open_corpus(store.folder)
    again = encode_corpus(TextEncoder(tokenizer, tokenizer.eos_token_id), {"train": source(texts)}, tmp_path)
    assert "tokenising again" in caplog.text
    assert (again.folder / name).read_bytes() == before


def test_a_reader_that_breaks_off_leaves_no_store(tmp_path: Path) -> None:
    def breaks() -> Iterator[str]:
        yield "one"
        raise DataError("line 2 is bad")

    with pytest.raises(DataError, match="line 2"):
        encode_corpus(TextEncoder(load_tokenizer("bpe:300", ["one"]), None), {"train": Source("x", breaks)}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_documents_are_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bpe:300", ["one"])
    with pytest.raises(DataError, match=r"data\.train_file: there are no documents"):
        encode_corpus(TextEncoder(tokenizer, None), {"train": source([])}, tmp_path)


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 2**14)
    tokenizer = load_tokenizer("bpe:300", made(20))

    def peak(count: int) -> int:
        source = Source(str(count), lambda: (f"{number} " + "of this union " * 60 for number in range(count)))
        tracemalloc.start()
        encode_corpus(TextEncoder(tokenizer, None), {"train": source}, tmp_path)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(50)  # what is imported and made once
    assert peak(800) < 1.5 * peak(100)


def test_a_store_goes_to_another_process_by_its_files(tmp_path: Path) -> None:
    import pickle

    store, _ = stored(made(50), tmp_path)
    sent = pickle.dumps(store)
    assert len(sent) < 1000
    np.testing.assert_array_equal(pickle.loads(sent).tokens, store.tokens)
