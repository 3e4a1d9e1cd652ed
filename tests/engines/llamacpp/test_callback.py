"""The compiled callback, without llama.cpp: against the formulas, and on tensors that are laid out as ggml's are."""

import ctypes
import struct

import pytest
import torch

pytest.importorskip("numba", reason="numba comes with steermoe[llamacpp]")

import numpy as np

from steermoe import formulas
from steermoe.engines.llamacpp import callback
from steermoe.engines.llamacpp.callback import FIELD, TensorLayout
from steermoe.engines.llamacpp.state import CallbackState
from steermoe.errors import CompatibilityError, SteeringError
from steermoe.models.gguf.header import GGUFModel
from steermoe.routing.shape import RouterShape
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.vector import SteeringVector

LAYERS, EXPERTS, TOP_K, CAPACITY = (1, 2, 4), 8, 2, 16
LAYOUT = TensorLayout(
    name=256, op=80, op_params=84, src=152, data=248, ne=16, nb=48, buffer=8,
    op_custom=83, op_softmax=40, op_unary=70, unary_sigmoid=7,
)  # fmt: skip


class Memory:
    """What stands in for a backend: get and set copy, and count; is_host answers what the test wants."""

    def __init__(self, is_host=True):
        self.copies = 0

        def copy(tensor, memory, offset, size):
            self.copies += 1
            data = struct.unpack_from("Q", (ctypes.c_char * 336).from_address(tensor), LAYOUT.data)[0]
            ctypes.memmove(*((memory, data) if self.reading else (data, memory)), size)

        self.reading = True

        def get(tensor, memory, offset, size):
            self.reading = True
            copy(tensor, memory, offset, size)

        def put(tensor, memory, offset, size):
            self.reading = False
            copy(tensor, memory, offset, size)

        words = [ctypes.c_uint64] * 4
        self.kept = (
            ctypes.CFUNCTYPE(None, *words)(get),
            ctypes.CFUNCTYPE(None, *words)(put),
            ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_uint64)(lambda buffer: is_host),
        )
        self.functions = tuple(ctypes.cast(function, ctypes.c_void_p).value for function in self.kept)


class FakeTensor:
    """A ggml tensor of [rows, columns] numbers, with its struct in memory."""

    def __init__(self, name, values, op=0, parameters=b"", source=None, stride=None):
        self.values = values
        self.struct = np.zeros(336, dtype=np.uint8)
        rows, columns = values.shape
        stride = stride or 4 * columns
        pack = struct.pack_into
        pack("4Q", self.struct, LAYOUT.ne, columns, rows, 1, 1)
        pack("4Q", self.struct, LAYOUT.nb, 4, stride, stride * rows, stride * rows)
        pack("i", self.struct, LAYOUT.op, op)
        self.struct[LAYOUT.op_params : LAYOUT.op_params + len(parameters)] = np.frombuffer(parameters, np.uint8)
        pack("Q", self.struct, LAYOUT.src, source.address if source else 0)
        pack("Q", self.struct, LAYOUT.data, values.ctypes.data)
        raw = name.encode()
        self.struct[LAYOUT.name : LAYOUT.name + len(raw)] = np.frombuffer(raw, np.uint8)

    @property
    def address(self):
        return self.struct.ctypes.data

    @property
    def op(self):
        return struct.unpack_from("i", self.struct, LAYOUT.op)[0]


def make_model(node="ffn_moe_logits", chooses_by_logits=True):
    routers = tuple(RouterShape(layer, EXPERTS, EXPERTS, TOP_K) for layer in LAYERS)
    return GGUFModel("x.gguf", "x", "mixtral", ("mixtral",), routers, 128, node, chooses_by_logits)


def make_state(reach="pieces", memory=None, **fields):
    memory = memory or Memory()
    state = CallbackState(make_model(**fields), LAYOUT, memory.functions, CAPACITY, reach)
    state.memory = memory
    return state


def vector(*experts, layers=LAYERS):
    weights = torch.zeros(len(layers), EXPERTS)
    weights[:, list(experts)] = torch.tensor([0.3, 0.2, 0.1])[: len(experts)]
    return SteeringVector("sport", None, layers, weights=weights)


def call(state, tensor, asks):
    prototype = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_uint64, ctypes.c_bool, ctypes.c_uint64)
    return prototype(callback.on_node.address)(tensor.address, asks, state.header.ctypes.data)


def random_logits(tokens=5, seed=0, shift=0.0):
    generator = np.random.default_rng(seed)
    return (generator.normal(size=(tokens, EXPERTS)) * 2 + shift).astype(np.float32)


# ---- nodes ----


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("ffn_moe_logits-1", True),
        ("ffn_moe_logits-4", True),
        ("ffn_moe_logits-3", False),  # a dense layer
        ("ffn_moe_logits-400", False),
        ("ffn_moe_logits_biased-1", False),
        ("ffn_moe_logits-1 (view)", False),
        ("ffn_moe_probs-1", False),
        ("ffn_moe_topk-1", False),
        ("ffn_moe_lots-1", False),
        ("ffn_out-1", False),
        ("", False),
    ],
)
def test_only_logits_of_steered_layers_are_asked_for(name, wanted):
    state = make_state()
    state.install([SteeringPlan(vector(1))])
    state.steer([0], [1.0])
    assert call(state, FakeTensor(name, random_logits(1)), True) is wanted


def test_layers_that_the_plan_leaves_alone_are_not_asked_for():
    state = make_state()
    state.install([SteeringPlan(vector(1), layers=(2, 3))])
    state.steer([0, -1], [1.0, 0.0])
    asked = [call(state, FakeTensor(f"ffn_moe_logits-{layer}", random_logits(2)), True) for layer in LAYERS]
    assert asked == [False, True, False]


@pytest.mark.parametrize("node", ["ffn_moe_logits", "ffn_moe_logits_biased", "ffn_moe_probs"])
def test_nothing_is_asked_for_without_steering(node):
    for reach in ("graph", "pieces"):
        state = make_state(reach, node=node)
        state.install([SteeringPlan(vector(1))])
        for numbers, factors in (([-1, -1], [1.0, 1.0]), ([0, 0], [0.0, 0.0])):
            state.steer(numbers, factors)
            assert not call(state, FakeTensor(f"{node}-1", random_logits(2), LAYOUT.op_softmax), True)
            assert state.verify() == 0


@pytest.mark.parametrize("is_host", [True, False], ids=["in place", "through the backend"])
@pytest.mark.parametrize("node", ["ffn_moe_logits", "ffn_moe_logits_biased", "ffn_moe_probs"])
def test_each_token_follows_its_own_plan(node, is_host):
    plans = [
        SteeringPlan(vector(1, 2), strength=3.0, formula="zero_max_scaled"),
        SteeringPlan(vector(4), strength=2.0, formula="additive", ban=((1, 0),)),
    ]
    memory = Memory(is_host)
    state = make_state(memory=memory, node=node)
    state.install(plans)
    logits = random_logits()
    tensor = FakeTensor(f"{node}-1", logits.copy())
    assert state.steer([0, -1, 1, 0, 1], [1.0, 1.0, 1.0, 0.0, 0.5]) == 3
    assert call(state, tensor, True)
    assert call(state, tensor, False)
    z = torch.from_numpy(logits)
    expected = z.clone()
    expected[0] = formulas.zero_max_scaled(z[:1], plans[0].vector.experts[0], 3.0)[0]
    for row, strength in ((2, 2.0), (4, 1.0)):
        expected[row] = formulas.additive(z[row : row + 1], plans[1].vector.experts[0], strength)[0]
        expected[row] = formulas.ban(expected[row : row + 1], torch.arange(EXPERTS) == 0)[0]
    torch.testing.assert_close(torch.from_numpy(tensor.values), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.from_numpy(tensor.values)[[1, 3]], z[[1, 3]])  # to the bit
    assert memory.copies == (0 if is_host else 2)


def test_the_last_layer_sees_only_wanted_tokens():
    state = make_state()
    state.install([SteeringPlan(vector(1), strength=3.0)])
    state.steer([-1, -1, 0, -1, 0], [1.0] * 5, outputs=[3, 4])
    logits = random_logits(2)
    tensor = FakeTensor("ffn_moe_logits-4", logits.copy())
    call(state, tensor, False)
    assert np.array_equal(tensor.values[0], logits[0])
    assert not np.array_equal(tensor.values[1], logits[1])


def test_share_of_the_vectors_experts():
    state = make_state()
    state.install([SteeringPlan(vector(1), strength=0.0, force=((1, 3),))])
    state.steer([0, 0], [1.0, 1.0])
    logits = np.zeros((2, EXPERTS), dtype=np.float32)
    logits[0, [1, 2]], logits[1, [5, 6]] = (3, 2), (3, 2)
    call(state, FakeTensor("ffn_moe_logits-1", logits), False)
    assert state.take_share() == (2, 12)  # 3 and 1, 3 and 5, of 3 layers: at strength 0 the vector raises none
    assert state.take_share() == (0, 0)


# ---- counting ----


def top_k_tensor(layer, chosen):
    """As in llama.cpp: a view of the first columns of all experts' order."""
    order = np.tile(np.arange(EXPERTS, dtype=np.int32), (len(chosen), 1))
    order[:, :TOP_K] = chosen
    tensor = FakeTensor(f"ffn_moe_topk-{layer}", order)
    struct.pack_into("Q", tensor.struct, LAYOUT.ne, TOP_K)
    return tensor


@pytest.mark.parametrize("is_host", [True, False])
def test_choices_are_counted_by_text(is_host):
    state = make_state(memory=Memory(is_host))
    state.install([])
    state.record(2)
    state.steer([-1] * 4, [0.0] * 4, outputs=[3], texts=[0, 0, 1, -1])
    assert call(state, top_k_tensor(1, [[0, 1]]), True)
    call(state, top_k_tensor(1, [[0, 1], [1, 2], [7, 6], [5, 5]]), False)
    call(state, top_k_tensor(4, [[3, 4]]), False)
    assert state.counts[0].tolist() == [[1, 2, 1, 0, 0, 0, 0, 0], [0] * 8, [0] * 8]
    assert state.counts[1].tolist() == [[0, 0, 0, 0, 0, 0, 1, 1], [0] * 8, [0] * 8]


def test_a_recording_may_end_at_the_last_router():
    state = make_state()
    state.record(1, stop=True)
    state.steer([-1], [0.0], outputs=[0], texts=[0])
    assert [call(state, top_k_tensor(layer, [[0, 1]]), False) for layer in LAYERS] == [True, True, False]
    state.record(1)
    assert call(state, top_k_tensor(4, [[0, 1]]), False)


def test_where_logits_do_not_tell_the_choice_is_read():
    state = make_state(chooses_by_logits=False)
    state.install([SteeringPlan(vector(1, 2))])
    state.steer([0, -1], [1.0, 1.0])
    call(state, FakeTensor("ffn_moe_logits-1", random_logits(2)), False)
    assert call(state, top_k_tensor(1, [[0, 1], [1, 2]]), True)
    call(state, top_k_tensor(1, [[0, 1], [1, 2]]), False)
    assert state.take_share() == (1, 2)


# ---- in the graph ----


def probabilities(logits, kind="softmax", layer=1):
    source = FakeTensor(f"ffn_moe_logits-{layer}", logits)
    op = LAYOUT.op_softmax if kind == "softmax" else LAYOUT.op_unary
    parameters = struct.pack("6i", 7 if kind == "sigmoid" else 1, 2, 3, 4, 5, 6)
    target = FakeTensor(f"ffn_moe_probs-{layer}", np.zeros_like(logits), op, parameters, source)
    return source, target


def run_custom(target, source, state):
    """As ggml runs a custom operation: with the function and the data that stand in its parameters."""
    function, tasks, _, data = struct.unpack_from("=QiiQ", target.struct, LAYOUT.op_params)
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_uint64)
    assert (tasks, data) == (1, state.header.ctypes.data)
    prototype(function)(target.address, source.address, 0, 1, data)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_probabilities_are_of_the_steered_logits(kind):
    state = make_state("graph")
    plan = SteeringPlan(vector(1, 2), strength=3.0, formula="zero_max_scaled", layers=(1, 1))
    state.install([plan])
    state.steer([0, -1, 0], [1.0, 1.0, 0.5])
    logits = random_logits(3)
    source, target = probabilities(logits.copy(), kind)
    before = target.struct.copy()
    assert not call(state, source, True)  # the graph stays whole
    assert not call(state, target, True)
    assert target.op == LAYOUT.op_custom
    run_custom(target, source, state)
    z = torch.from_numpy(logits)
    z[0] = formulas.zero_max_scaled(z[:1], plan.vector.experts[0], 3.0)[0]
    z[2] = formulas.zero_max_scaled(z[2:], plan.vector.experts[0], 1.5)[0]
    torch.testing.assert_close(torch.from_numpy(source.values), z, rtol=1e-6, atol=1e-6)
    wanted = z.softmax(-1) if kind == "softmax" else z.sigmoid()
    torch.testing.assert_close(torch.from_numpy(target.values), wanted, rtol=1e-5, atol=1e-6)
    assert state.verify() == 1
    # and the node is as it was once nothing is steered, as llama.cpp keeps its graph from token to token
    call(state, target, True)
    assert target.op == LAYOUT.op_custom
    state.steer([-1], [0.0])
    assert not call(state, target, True)
    assert np.array_equal(target.struct, before)


@pytest.mark.parametrize(
    ("op", "message"),
    [(55, "computed no node .* in a known way"), (LAYOUT.op_unary, "stored or used in an unknown way")],
)
def test_a_node_that_is_something_else_is_an_error(op, message):
    state = make_state("graph")
    state.install([SteeringPlan(vector(1))])
    state.steer([0], [1.0])
    _, target = probabilities(random_logits(1))
    struct.pack_into("i", target.struct, LAYOUT.op, op)
    call(state, target, True)
    with pytest.raises(SteeringError, match=message):
        state.verify()


# ---- what can go wrong ----


def test_rows_that_do_not_fit_the_tokens():
    state = make_state()
    state.install([SteeringPlan(vector(1))])
    state.steer([0, 0, 0], [1.0] * 3, outputs=[2])
    call(state, FakeTensor("ffn_moe_logits-1", random_logits(2)), False)
    with pytest.raises(SteeringError, match="do not match the tokens of the call"):
        state.verify()


def test_a_router_that_was_passed_by():
    state = make_state()
    state.install([SteeringPlan(vector(1))])
    state.steer([0], [1.0])
    call(state, FakeTensor("ffn_moe_logits-1", random_logits(1)), False)
    with pytest.raises(SteeringError, match=r"2 of 3 routers .* 'ffn_moe_logits-2'"):
        state.verify()


def test_a_router_that_is_passed_by_in_a_later_call_is_noticed():
    """What is the same as in the call before is not worked out again, but is looked at."""
    state = make_state()
    state.install([SteeringPlan(vector(1), layers=(2, 4))])
    for seen in ((2, 4), (2, 4), (4,), (2, 4), (2, 2, 4)):
        assert state.steer([0], [1.0]) == 1
        for layer in seen:
            call(state, FakeTensor(f"ffn_moe_logits-{layer}", random_logits(1)), False)
        if len(set(seen)) == 2:
            assert state.verify() == len(seen)
        else:
            with pytest.raises(SteeringError, match=r"1 of 2 routers .* 'ffn_moe_logits-2'"):
                state.verify()
    assert state.take_share()[1] == 5 * TOP_K + 10 * TOP_K  # of the layer that it leaves alone; of edited logits


def test_what_a_call_asks_for_is_not_kept_for_another_or_for_other_plans():
    logits = random_logits(2)

    def edited(state, plans, *asked):
        if plans:
            state.install(plans)
        state.steer(*asked)
        tensor = FakeTensor("ffn_moe_logits-1", logits.copy())
        call(state, tensor, False)
        return tensor.values

    one, other = SteeringPlan(vector(1), 3.0, "additive"), SteeringPlan(vector(4), 2.0, "additive")
    kept, installed = make_state(), []
    for plans, asked in (
        ([one, other], ([0, 1], [1.0, 1.0])),
        (None, ([0, 1], [1.0, 1.0])),
        (None, ([0, 1], [1.0, 0.5])),
        (None, ([1, 1], [1.0, 0.5])),
        (None, ([-1, 1], [1.0, 0.5])),
        ([other, one], ([-1, 1], [1.0, 0.5])),
        (None, (np.array([-1, 1]), np.array([1.0, 0.5]))),
    ):
        installed = plans or installed
        found = edited(kept, plans, *asked)
        assert np.array_equal(found, edited(make_state(), installed, *asked))


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (SteeringPlan(vector(1, layers=(1, 2, 3))), CompatibilityError, "decoder layers"),
        (SteeringPlan(force=((3, 0),)), SteeringError, r"expert \(3, 0\) does not exist"),
        (SteeringPlan(vector(1), layers=(3, 3)), SteeringError, "hold no router"),
        (SteeringPlan(force=((1, 0), (1, 1), (1, 2))), SteeringError, "force at most 2"),
        (SteeringPlan(vector()), SteeringError, "would be"),
    ],
)
def test_plans_that_do_not_fit(plan, error, message):
    state = make_state()
    with pytest.raises(error, match=message):
        state.install([plan])


def test_header_fields_are_where_the_callback_reads_them():
    assert [FIELD[name] for name in ("at_name", "op_custom", "get", "kind", "tokens", "a_row", "a_state")] == [
        callback._AT_NAME, callback._OP_CUSTOM, callback._GET, callback._KIND, callback._TOKENS, callback._A_ROW,
        callback._A_STATE,
    ]  # fmt: skip
