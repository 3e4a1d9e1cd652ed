"""Pickled tables: those of older pandas, and programs that ask for more than a table."""

import base64
import pickle
import struct
import zlib

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe.errors import VectorError
from steermoe.vectors.formats import pickles
from steermoe.vectors.formats.pickles import Made, read_table
from steermoe.vectors.formats.ranking import COLUMNS, read_ranking
from tests.support import other_tools
from tests.vectors.test_file import EDITS, edited

WRITTEN = {
    "pandas 2.2.3, numpy 2.4, protocol 5": (
        "eNrFVc1u00AQttOkTdPyLxV6gWuQUJS0QnAApaIUCVwC6r1are11bNV2rPVabSUqlUP/pL2xVIIjb9ETZ868AI/AG8DM1k7d0Fza"
        "A2PJ3+zPzO43Ozu7W/v8bdLQIm8lNHZp2nIGnLU8TiOm5PRLKugrrX9SDz+qHdWUVRL1uZL3y9ODWDAe0zBtRTSmfcZTJWdfhANn"
        "4+1pG8zlXG5BwsBOz0yUvEGyOAmcjZARG21w8p04i5LtFtHuQWc8cJScIR4fRHbmedpl89ioGCWpL10Nf3f/LxpLV8Nf3cvi1y8o"
        "Py6Ni1p+fs/bI3gyil1jRHL7Mf5P/sFReyVrOmEAXbGdYLrKivdUHR0eqDXVtCak+Uz1er03f0D0zzKEsq26Vd9X0lxWAqb515vH"
        "RUSLvJrIsZpjLcf81hhTRerl2Cg25N+WlaC0AX/uouX3lD+PS1sVnObP4BZ2jYvFHNMe1z8xhoo50j9uHeU/sCoYn9MtyrqdBaEI"
        "YrixtTQMHAyyZcAU86DEQM6Vb26UgQXlnMLJzBLOnEGcCp45Amz9m3IKCoIeRE97atm01Wm4TPhwZQjiu3On+GHkFLsQxqN1KEtT"
        "q+12Y6W9qAptQWudc32dYd/ZaHs42h72dRQDv/4ja9pqlOkdKFzq3vnS57ItlrZsmkLBbJCYbZLX2IcM38taoevS6UI5Vf6i/xjZ"
        "+k8KrjPQeK5Z1EK6DaVNTrKthHEBSUw7+IPtVlzUXNCqtENihAWEaR6kG8QNPA9CvIrmZCU3vjYcItRONSdZjbGa97J9PK01OX8R"
        "F07jPpJZQywR8P0eHL2g4NsyZDUVg0RZdVQYKKb2yfAHjwTcQtgbEi7eEhIxQXUE1iGDqBDwSuwAVeKFtK/VuzQMB5spcbME8osK"
        "RkJqM3giDtPMbv0FjVP5fg=="
    ),
    "pandas 2.2.3, numpy 2.4, protocol 2": (
        "eNrNVelv3EQU926ObtyWG8pdyrnlWNYbjgCBhNIUWrdbGC5zhGFsz65NvF7/PLMkkVipfEi2+cwnkJD4E/jKJ6TkD4OZWZtuUlKE"
        "IiHGkt978+43b+ZdqwYZS0MmGkE/541OznrcPs8ku2AwWGe/R2WIat2btiyL9ro5pvZpxKnkecoS0eixlHV5LuxzST9YuzKmbEyX"
        "4jSJfXFD3qaDNIuDtYRTXyvYmAnSQS/bbFBjuDdIZMzynG3aNOdBPxUyHwTSxuxYzFZGDRfHXGsLtUCphTwQNk81YmPOq6iQfdje"
        "rIIJk3Hq4Pg2ThCcHOE2gtvrbsWtubVt3FGYDOVmpjTv9KpKo7OAu3auj3A3wT11d8pYW8S97Xb70h9qmZ9rSdzn70Rz3s9axaza"
        "8tHg3q9L/yvEWj4a3Ptl6YjI7k+7P5bf3s5/R86btffD7u/7Gbemd3/7J7os7F+rdPQvwlNWbk0e9IFTkWr++wkekHjQj2Yjc20e"
        "itRdeJjgEXMXtvBoNG7+eAGndfM/RnBGNX90c9s/btpen3HZ+VMFnC7gTAFnC3isvCAFtMvIntCRPUnwlMTTvlsd4RmCejRTxnhW"
        "x/gswXM6xqq+r89HZ7Tza9bNq3IIfdh+GfTBJCoH9g/zgxd08A2CFyWafkCpP4jVw5VSaoskDtRr4riWiroyQotgXmf3EsHLN7J7"
        "RWf3KsGCzq6is3utOIOrC3hdn8EbBIvlA/Qd3tx/EksSb/k7q1iqe7q+l5tNe6U5j+UJqoW3C8oxvHMTPAfvTPBaOD9BNbEyIdnE"
        "hQmeg3e5xHt+5Lhzrq2zu0hwSWfnElwe4coq2vUDgyLkG1w0fCa4TVO+Ti/qHRtXDxcrJN4f4oPxAArVZAIpS/ehLt1HBB/r0h3f"
        "wifRoqrEp3Vvxjz4mzyHZx5/vpHxXOIzU1bm4PMx0sIXBgkdfDlGWlg1fphDU3w1RlsKpd6cQvNYrNEw7nTwtXdCl0K7oCtj48w7"
        "OSlCmS/gqxoFvjGTqnGKsD3YBifoRH+fdM7SLreJ/hepd4eI6lHYNikJyZSj2LWMRSH7Gb5xawXBM6y5FWU/IejxbaQE/fHQVkMN"
        "mUlAl8+MeMDQtMclMzXNVyGMDyZlLiCHGJjK0U7CugLfDrHundLsJOmvCxoOMtXcTHKaMJ8nAhvXxcBv/Anupm8h"
    ),
    "pandas 1.5.3, numpy 1.26, protocol 4": (
        "eNrFVc1u00AQttOk+SlQVQgoEuKIyiVKWg4ckBI1FAlcghRxrVbreBObOI7lXauNRKVyoG2k5dTlAG/SE2fOvACPwBvAzNZOU7e5"
        "tAf24G92dmd2vvXM7EH+65dFQw+5EtLAobzaHUWs2ovokClZfkkFfaXlE/X0k9pXazJPhv1Iycez271AsCigPq8OaUD7LOJK3tr0"
        "R93B27M5mMv7iQXxPZufmyi5TOIg9LoDnxEbbXDzvSAehuMz78PYFx6NIjoGryRi3VHARRR3BW4s6I1KFsG33nKiLOOzapm2OlId"
        "tWaZVskqHSp3WRYcMQ6Ricz1nqvJ8dn6gjRfqHa7/eYvDP2xDKHsyaaRM5JRat4M/zT+LxrNm+HvxnXx+zccP6+NG3r8+pHMM3ia"
        "xZTvdCT2c/yfXsKsvYJMcO+4K5hS7t1pQsFkVea8mSRyH12RQq1mmkILCeYTLCSYFJ9RTDMtwcrM+VYOz3CXLseR04n9ZNI6yMZt"
        "zpnP06fxZeM1M/p552CcsmTHHlRqACVd4L7XZboWIUoTA55Pw9Q04ELfXajKj5mqbOCV7kAHKm7XapWt2oZKpXUt1S/o6lPd+Wpt"
        "ulqb6uqK4T9+ZpWtymygRwqPWr3Y5Ry2x3jVphx6Y4UEbJe8Rh3wdDuykMq6SzrQOdVlrkswaWgWBZ+OoTHKRbYXskhAU6J1/EC4"
        "OQclB6Q8rZMAYR2hHHl8QByv14NGuI3mZCsxvj1dItTmmpPMB9i42/Eh3vt7+fAqLhEN+kimgzhDwP3Qhp8oKPi2DJnnYhQqq4QC"
        "A8HUPhl+4D2ArgqxIeH02SBDJqi+gR3IBSoEPAj7QJX0fNrX4gPq+6NdTpw4hEyhghGf2gxeg2Me29V/G730NQ=="
    ),
}
"""A ranking of 2 layers x 4 experts as these versions write it, compressed; risk_diff is (layer - expert) / 10."""


def written(version: str) -> bytes:
    return zlib.decompress(base64.b64decode(WRITTEN[version]))


@pytest.mark.parametrize("version", WRITTEN)
def test_tables_of_other_versions(version):
    cells = read_ranking("x.pkl", written(version))
    assert cells.weights == {(layer, expert): (layer - expert) / 10 for layer in range(2) for expert in range(4)}
    assert (cells.layers, cells.experts) == ((0, 1), 4)


def test_columns_that_share_a_block_and_names_in_plain_objects():
    table = pd.DataFrame({"risk_diff": [0.5, -1.0], "layer": [0, 0], "expert": [0, 1], "text": ["a", "b"]})
    table.columns = pd.Index(list(table.columns), dtype=object)
    table["big"] = np.array([1, 2], dtype=">i4")
    found = read_table("x.pkl", pickle.dumps(table), (*COLUMNS, "big"))
    assert {name: column.tolist() for name, column in found.items()} == {
        "risk_diff": [0.5, -1.0],
        "layer": [0, 0],
        "expert": [0, 1],
        "big": [1, 2],
    }


def test_a_column_of_texts_is_no_column_of_numbers():
    table = pd.DataFrame({"layer": ["0"], "expert": [0], "risk_diff": [0.5]})
    with pytest.raises(VectorError, match="has no column layer of numbers"):
        read_table("x.pkl", pickle.dumps(table), COLUMNS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, 0, 0.5), (0, 0, 0.25)], "has 2 rows for 1 layers, expected one for each of 1 experts"),
        ([(0, 0, 0.5), (1, 1, 0.25)], "has 2 rows for 2 layers, expected one for each of 2 experts"),
        ([(0, -1, 0.5), (0, 0, 0.5)], "its column expert has -1, expected whole numbers"),
        ([(0.5, 0, 0.5), (0, 1, 0.5)], r"its column layer has 0\.5, expected whole numbers"),
        ([], "has 0 rows"),
    ],
)
def test_tables_that_are_no_ranking(rows, message):
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"risk_diff": float})
    if not rows:
        table = table.astype({"layer": int, "expert": int})
    with pytest.raises(VectorError, match=message):
        read_ranking("x.pkl", pickle.dumps(table))


def test_a_long_program_is_not_run_to_its_end(monkeypatch):
    monkeypatch.setattr(pickles, "MAX_STEPS", 100)
    with pytest.raises(VectorError, match="asks for more than 100 steps"):
        read_ranking("x.pkl", other_tools.ranking())


def test_deep_nesting_is_an_error_not_a_crash():
    """Python's own unpickler hashes such a key in C, to the end of the stack."""
    deep = b"\x80\x04}" + b"(" + b")" + b"\x85" * 200_000 + b"Nu."
    with pytest.raises(VectorError, match="entries whose names are no text"):
        read_ranking("x.pkl", deep)


@pytest.mark.parametrize("shape", [(2**2000,) * 100_000, (2**2000, 0), (), (1, 1, 1)], ids=["long", "huge", "0", "3"])
def test_shapes_are_checked_before_they_are_multiplied(shape):
    content = bytes(8 if 0 not in shape else 0)
    with pytest.raises(ValueError, match=r"^$"):
        pickles._array(Made("numpy._frombuffer", (content, Made("numpy.dtype", ("f8",)), shape, "C")))


def arrow(ends: tuple[int, ...], text: bytes) -> Made:
    offsets = struct.pack(f"<{len(ends)}q", *ends)
    buffers = [None, *(Made("pyarrow.lib.py_buffer", (content,)) for content in (offsets, text))]
    kind = Made("pyarrow.lib.type_for_alias", ("large_string",))
    return Made("pyarrow.lib._restore_array", ((kind, len(ends) - 1, 0, 0, buffers, []),))


def test_names_of_pyarrow_do_not_overlap():
    assert pickles._arrow_texts(arrow((1, 3, 3, 5), b"-abcd")) == ["ab", "", "cd"]
    for ends in ((0, 5, 0, 5), (-5, 5), (0, 6)):
        with pytest.raises(ValueError, match=r"^$"):
            pickles._arrow_texts(arrow(ends, b"abcde"))


def test_a_table_has_no_more_blocks_than_columns(monkeypatch):
    table = pickle.dumps(pd.DataFrame({"layer": [0], "expert": [0], "risk_diff": [0.5]}))
    monkeypatch.setattr(pickles, "MAX_COLUMNS", 4)
    assert len(read_table("x.pkl", table, COLUMNS)) == 3
    read = pickles._Machine().run(table)
    manager = read.state["_mgr"]
    manager.args = (manager.args[0] * 3, manager.args[1])
    with pytest.raises(ValueError, match=r"^$"):
        pickles._columns(read, COLUMNS)


@pytest.mark.fuzz
@given(version=st.sampled_from(list(WRITTEN)), edits=EDITS)
def test_a_damaged_table_is_numbers_or_an_error(version, edits):
    try:
        cells = read_ranking("x.pkl", edited(written(version), edits))
    except VectorError as error:
        message = str(error)
        assert message.isprintable()
        assert len(message) < 600
    else:
        assert len(cells.weights) == len(cells.layers) * cells.experts
