"""Names of domains: letters of any script, the same bytes on every system, nothing that leaves a folder or hides."""

import sys
import unicodedata
from pathlib import PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe.errors import VectorError
from steermoe.vectors.file import MAX_NAME_BYTES, check_domain_name, normal_name, read_header, write_vector
from steermoe.vectors.library import find_vectors, load_vector

HINDI, JAPANESE = "मौसम", "ガス"


@pytest.mark.parametrize("name", ["sport", "a", "7", "x_1-b", "погода", "спорт-2", "体育", HINDI, "fußball", "أخبار"])
def test_letters_of_any_script(name):
    assert check_domain_name(name) == name


@pytest.mark.parametrize(
    ("typed", "stored"),
    [
        (unicodedata.normalize("NFD", JAPANESE), JAPANESE),
        (unicodedata.normalize("NFD", "ёлка"), "ёлка"),
        ("ｓｐｏｒｔ", "sport"),
        ("ﬁsh", "fish"),
    ],
)
def test_two_ways_to_type_a_name_are_one(typed, stored):
    assert typed != stored
    assert check_domain_name(typed) == stored


@pytest.mark.parametrize(
    "name",
    [
        *("", "-a", "_a", "a b", "Sport", "Погода", "a.b", "a/b", "a\\b", "..", "a:b", "a+b", "a=b", "a\n", "a\0"),
        *("．．／a", "a\u202eb", "a\u200bb", "a\u200db", "a\u2066b", "a\u0085", "\u0301a", "a\u034fb", "a\u3164b"),
        *("a\ufe0f", "\u115fa", "a\U000e0101", "a\udcff", "🏀", "a\u00adb", "a\x1b[31m", "[news]", "$(x)", "a'b"),
    ],
)
def test_names_that_could_leave_a_folder_or_hide(name):
    assert normal_name(name) is None
    with pytest.raises(VectorError, match="is not allowed: use lowercase letters of any script") as caught:
        check_domain_name(name)
    assert str(caught.value).isprintable()


def test_a_name_fits_into_a_file_name():
    assert check_domain_name("a" * MAX_NAME_BYTES)
    with pytest.raises(VectorError, match=r"'a{60}\.\.\.' is not allowed: .*at most 200 bytes"):
        check_domain_name("a" * (MAX_NAME_BYTES + 1))
    assert normal_name("я" * 100) is not None
    assert normal_name("я" * 101) is None


def test_a_vector_is_found_by_its_name_however_it_is_typed(bare_search_path, make_vector):
    decomposed = unicodedata.normalize("NFD", JAPANESE)
    write_vector(make_vector(decomposed), bare_search_path / "steering_vectors" / f"{decomposed}.safetensors")
    write_vector(make_vector("спорт"), bare_search_path / "steering_vectors" / "спорт.safetensors")
    assert {file.domain for file in find_vectors()} == {JAPANESE, "спорт"}
    assert load_vector(JAPANESE).domain == load_vector(decomposed).domain == JAPANESE
    assert read_header(bare_search_path / "steering_vectors" / "спорт.safetensors").domain == "спорт"


def test_a_command_takes_it(run, bare_search_path, make_vector):
    write_vector(make_vector("спорт"), bare_search_path / "steering_vectors" / "спорт.safetensors")
    result = run("vectors", "show", "спорт")
    assert result.code == 0, result.err
    assert "спорт" in result.out
    assert run("vectors", "list").out.splitlines()[1].split()[0] == "спорт"


@pytest.mark.fuzz
@given(st.text(st.characters() | st.sampled_from("aя7-_./\\\u202e\u0301＿／"), max_size=20))
def test_any_text_is_a_safe_name_or_an_error(text):
    name = normal_name(text)
    if name is None:
        return
    assert normal_name(name) == name == unicodedata.normalize("NFC", name)
    assert name.isprintable()
    assert PurePosixPath(name).name == PureWindowsPath(name).name == name
    assert not set(name) & set("./\\:*?\"<>|'$`=+[] \t")
    assert 0 < len(name.encode(sys.getfilesystemencoding())) <= MAX_NAME_BYTES
    assert unicodedata.bidirectional(name[0]) not in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
