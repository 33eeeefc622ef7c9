import pytest

from byte_tokenizer import BOS, byte_tokenizer
from kvfold.data import TextFile, text_windows


def text_of(*documents: str) -> TextFile:
    return TextFile(name="news", documents=documents, digest="0")


def test_windows_are_consecutive_and_evenly_spaced():
    tokenizer = byte_tokenizer()
    text = text_of("".join(chr(97 + index % 26) for index in range(70)), "end")
    windows = text_windows(text, tokenizer, windows=3, context_tokens=10)
    # 75 bytes with the blank line: seven windows, of which 0, 2 and 4 are taken.
    assert windows.ids_WT.shape == (3, 10)
    assert [tokenizer.decode(row) for row in windows.ids_WT] == [text.joined[at : at + 10] for at in (0, 20, 40)]
    assert windows.scored_bytes == (9, 9, 9)
    assert (windows.name, windows.digest) == ("news", "0")


def test_documents_are_joined_by_a_blank_line_and_no_special_token():
    tokenizer = byte_tokenizer()
    windows = text_windows(text_of("ab", "cd"), tokenizer, windows=1, context_tokens=6)
    assert tokenizer.decode(windows.ids_WT[0]) == "ab\n\ncd"


def test_a_bos_that_the_tokenizer_adds_opens_each_window():
    tokenizer = byte_tokenizer(adds_bos=True)
    windows = text_windows(text_of("abcdefghij"), tokenizer, windows=2, context_tokens=6)
    assert windows.ids_WT[:, 0].tolist() == [BOS, BOS]
    assert [tokenizer.decode(row[1:]) for row in windows.ids_WT] == ["abcde", "fghij"]
    # Behind a bos every byte of the text is predicted.
    assert windows.scored_bytes == (5, 5)


def test_bytes_are_those_of_the_scored_text_when_letters_take_several():
    windows = text_windows(text_of("aäöü€" * 4), byte_tokenizer(), windows=4, context_tokens=10)
    assert windows.scored_bytes == (9, 9, 9, 9)


def test_fewer_windows_than_asked_are_all_taken_and_said():
    with pytest.warns(UserWarning, match="news: the text has 2 windows of 10 tokens, not 5"):
        windows = text_windows(text_of("x" * 25), byte_tokenizer(), windows=5, context_tokens=10)
    assert windows.num_windows == 2
    assert windows.context_tokens == 10


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"windows": 0, "context_tokens": 10}, "0 windows"),
        ({"windows": 1, "context_tokens": 1}, "context of 1 tokens"),
        ({"windows": 1, "context_tokens": 33, "most_context_tokens": 32}, "the model reads 32 at most"),
        ({"windows": 1, "context_tokens": 30}, "news: the text has 25 tokens and a window takes 30"),
    ],
)
def test_what_can_not_be_cut_is_one_line(settings: dict, says: str):
    with pytest.raises(ValueError, match=says) as error:
        text_windows(text_of("x" * 25), byte_tokenizer(), **settings)
    assert "\n" not in str(error.value)
