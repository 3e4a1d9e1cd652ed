"""What `make dist` checks: files that a distribution lacks or should not contain, and its sizes."""

import io
import tarfile
import zipfile

import pytest

from recipes.distributions import (
    TRAINED_PART,
    expected_in_sdist,
    expected_in_wheel,
    files_of_sdist,
    files_of_wheel,
    main,
    sdist_problems,
    summary,
    wheel_problems,
)
from steermoe.evaluation.texts import DATA
from steermoe.models.default import spec
from tests.support.pages import ROOT


def test_a_wheel_has_code_vectors_texts_and_the_trained_part_alone():
    expected = expected_in_wheel()
    vectors = {f"steermoe/steering_vectors/{spec.NAME}/{domain}.safetensors" for domain in spec.DOMAINS}
    texts = {path.relative_to(ROOT).as_posix() for path in DATA.iterdir() if path.suffix == ".txt"}
    assert vectors | texts | {TRAINED_PART, "steermoe/py.typed", "steermoe/__main__.py"} <= expected
    assert {name.partition("/")[0] for name in expected} == {"steermoe"}
    assert wheel_problems([*expected, "steermoe-0.2.0.dist-info/METADATA"]) == []


def test_an_sdist_has_what_its_tests_need():
    expected = expected_in_sdist()
    needed = {
        "Makefile",
        "constraints.txt",
        "mkdocs.yml",
        "Dockerfile",
        "tests/conftest.py",
        "recipes/distributions.py",
    }
    assert needed | {TRAINED_PART, "docs/play.png", "benchmarks/speed.py"} <= expected
    assert sdist_problems([*expected, "PKG-INFO", ".gitignore", "pyproject.toml"]) == []


@pytest.mark.parametrize("name", ["recipes/word_lists.py", "benchmarks/speed.py", "steermoe/__pycache__/x.pyc"])
def test_what_does_not_belong_into_a_wheel_is_found(name):
    assert wheel_problems(expected_in_wheel() | {name}) == [f"not expected: {name}"]


def test_what_is_missing_is_found():
    assert wheel_problems(expected_in_wheel() - {TRAINED_PART}) == [f"missing: {TRAINED_PART}"]
    assert sdist_problems(expected_in_sdist() - {"mkdocs.yml"}) == ["missing: mkdocs.yml"]


def test_a_second_trained_part_is_found():
    name = "build/trained_part.safetensors"
    assert sdist_problems(expected_in_sdist() | {name}) == [f"not expected: {name}", f"twice: {name}"]


def test_files_are_read_and_summed_up(tmp_path):
    wheel, sdist = tmp_path / "a-1-py3-none-any.whl", tmp_path / "a-1.tar.gz"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a/large", bytes(2**20))
        archive.writestr("a/small", b"1")
    with tarfile.open(sdist, "w:gz") as archive:
        member = tarfile.TarInfo("a-1/folder/file")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"123"))
    assert files_of_wheel(wheel) == {"a/large": 2**20, "a/small": 1}
    assert files_of_sdist(sdist) == {"folder/file": 3}
    assert summary(wheel, files_of_wheel(wheel)) == (
        "a-1-py3-none-any.whl: 1.0 MiB, 2 files, unpacked 1.0 MiB; largest: a/large 1.0 MiB, a/small 0.0 MiB"
    )
    with pytest.raises(SystemExit, match=r"a-1-py3-none-any.whl is wrong: missing: steermoe/__init__.py"):
        main(tmp_path)


def test_two_wheels_are_refused(tmp_path):
    for number in "12":
        (tmp_path / f"{number}.whl").touch()
    with pytest.raises(SystemExit, match=r"has 2 files \*.whl, expected 1"):
        main(tmp_path)
