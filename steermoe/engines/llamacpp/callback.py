"""What runs inside llama.cpp while it computes: the compiled callback that changes router logits and counts choices.

For every node of its graph, about 1,800 per token, llama.cpp asks a callback whether it wants to see the node's data
once it is computed. In Python that would cost up to a tenth of the time, so this is a compiled kernel, which numba
keeps on disk. It knows nothing about models and does not import llama.cpp: `TensorLayout` says where things are in a
ggml tensor, and the arrays of `CallbackState` say what to do.

There are two ways to reach the logits. On any backend, the callback asks for the node of the logits, gets them once
they are computed, and writes them back; the graph then runs in pieces, one per steered layer. On the CPU, the node that
turns logits into probabilities becomes a custom operation instead, which edits the logits and then does what the node
did; the graph stays whole.

Where experts are forced or banned, the callback also asks for the order of all experts by score, from which llama.cpp
takes the first k, and moves forced experts to its front and banned ones to its end.

Shapes: T tokens of a forward call, N experts of a layer, L routers, P distinct plans, B texts, k experts chosen.
"""

from dataclasses import dataclass

import numpy as np
from numba import carray, cfunc, njit, types

from steermoe.engines.llamacpp.pointers import ask_host, copy_tensor, half_word, word
from steermoe.steering.kernels import edit_row, pointer
from steermoe.steering.tables import BANNED, FORCED, RAISED

NAME_BYTES = 64
FFN_MOE = int.from_bytes(b"ffn_moe_", "little")
LOGITS, BIASED, PROBABILITIES, TOP_K, ORDER = 0, 1, 2, 3, 4
"""Kinds of nodes of the graph, by name; others are -1."""

# Positions in the state's header, an array of 64-bit integers that the callback gets as its user data.
_FIELDS = (
    *("at_name", "at_op", "at_op_params", "at_src", "at_data", "at_ne", "at_nb", "at_buffer"),
    *("op_custom", "op_softmax", "op_unary", "unary_sigmoid", "custom_edit"),
    *("get", "set", "is_host"),
    *("kind", "in_graph", "from_topk", "stop_after", "experts", "top_k", "max_layer", "routers"),
    *("tokens", "outputs", "has_texts", "hits", "slots", "problem"),
    *("a_row", "a_active", "a_push", "a_marks", "a_formula", "a_paper", "a_number", "a_factor", "a_output", "a_text"),
    *("a_counts", "a_calls", "a_saved", "a_scratch", "a_state"),
    *("any_listed", "a_listed", "a_ordered", "forced_hits", "forced_places", "banned_hits", "banned_places"),
    *("a_source", "a_counted"),
    *("has_trace", "a_slot", "a_looked", "a_edited", "a_chosen"),
)
FIELD = {name: number for number, name in enumerate(_FIELDS)}
_AT_NAME, _AT_OP, _AT_OP_PARAMS, _AT_SRC, _AT_DATA, _AT_NE, _AT_NB, _AT_BUFFER = range(8)
_OP_CUSTOM, _OP_SOFTMAX, _OP_UNARY, _UNARY_SIGMOID, _CUSTOM_EDIT, _GET, _SET, _IS_HOST = range(8, 16)
_KIND, _IN_GRAPH, _FROM_TOPK, _STOP_AFTER, _EXPERTS, _TOP_K, _MAX_LAYER, _ROUTERS = range(16, 24)
_TOKENS, _OUTPUTS, _HAS_TEXTS, _HITS, _SLOTS, _PROBLEM = range(24, 30)
_A_ROW, _A_ACTIVE, _A_PUSH, _A_MARKS, _A_FORMULA, _A_PAPER, _A_NUMBER, _A_FACTOR, _A_OUTPUT, _A_TEXT = range(30, 40)
_A_COUNTS, _A_CALLS, _A_SAVED, _A_SCRATCH, _A_STATE = range(40, 45)
_ANY_LISTED, _A_LISTED, _A_ORDERED, _FORCED_HITS, _FORCED_PLACES, _BANNED_HITS, _BANNED_PLACES = range(45, 52)
_A_SOURCE, _A_COUNTED = 52, 53
_HAS_TRACE, _A_SLOT, _A_LOOKED, _A_EDITED, _A_CHOSEN = range(54, 59)

PROBLEM_SHAPE, PROBLEM_TYPE = 1, 2
PARAMETERS = 6
"""32-bit words that a custom operation takes of a node's parameters: function, tasks, user data."""
SAVED = 1 + PARAMETERS
"""Numbers saved of a node that becomes a custom operation: its operation and parameters."""


@dataclass(frozen=True)
class TensorLayout:
    """Byte offsets in ggml's tensor struct, and numbers of its operations; `layout` finds them."""

    name: int
    op: int
    op_params: int
    src: int
    data: int
    ne: int
    nb: int
    buffer: int
    op_custom: int
    op_softmax: int
    op_unary: int
    unary_sigmoid: int


# ---- a whole node ----


@njit(error_model="numpy")
def _next_chosen(z_N, last):
    """The expert after `last` in descending order of logits; the first one for -1."""
    found = -1
    for n in range(len(z_N)):
        if last >= 0 and (z_N[n] > z_N[last] or (z_N[n] == z_N[last] and n <= last)):
            continue
        if found < 0 or z_N[n] > z_N[found]:
            found = n
    return found


@njit(error_model="numpy")
def _look(state, row, token, z_N, is_edited):
    """Keep one layer's logits of a token whose text is traced, before or after the edit."""
    slot = carray(pointer(state[_A_SLOT]), (state[_TOKENS],), np.int32)[token]
    if slot < 0:
        return
    experts, place = state[_EXPERTS], slot * state[_ROUTERS] + row
    carray(pointer(state[_A_EDITED]), (place + 1,), np.uint8)[place] = 1
    start = state[_A_LOOKED] + 4 * experts * (2 * place + is_edited)
    kept_N = carray(pointer(start), (experts,), np.float32)
    for n in range(experts):
        kept_N[n] = z_N[n]


@njit(error_model="numpy")
def _edit_node(state, row, z_TN):
    """Steer the rows of one layer's logits, and count the choices unless llama.cpp's own are read."""
    tokens, experts = z_TN.shape
    every, outputs, routers = state[_TOKENS], state[_OUTPUTS], state[_ROUTERS]
    if experts != state[_EXPERTS] or tokens not in (every, outputs):
        state[_PROBLEM] = PROBLEM_SHAPE
        return
    number_T = carray(pointer(state[_A_NUMBER]), (every,), np.int32)
    factor_T = carray(pointer(state[_A_FACTOR]), (every,), np.float32)
    output_T = carray(pointer(state[_A_OUTPUT]), (max(outputs, 1),), np.int32)
    carray(pointer(state[_A_CALLS]), (routers,), np.int64)[row] += 1
    for t in range(tokens):
        token = t if tokens == every else output_T[t]
        number = number_T[token]
        if number < 0 or factor_T[token] == 0:
            continue
        start = (number * routers + row) * experts
        push_N = carray(pointer(state[_A_PUSH] + 4 * start), (experts,), np.float32)
        marks_N = carray(pointer(state[_A_MARKS] + start), (experts,), np.uint8)
        formula = carray(pointer(state[_A_FORMULA] + 4 * number), (1,), np.int32)[0]
        paper = carray(pointer(state[_A_PAPER] + 4 * number), (1,), np.int32)[0]
        z_N = z_TN[t]
        if state[_HAS_TRACE] != 0:
            _look(state, row, token, z_N, 0)
        edit_row(z_N, push_N, marks_N, formula, paper != 0, factor_T[token])
        if state[_HAS_TRACE] != 0:
            _look(state, row, token, z_N, 1)
        if state[_FROM_TOPK] == 0:
            chosen = -1
            for _ in range(state[_TOP_K]):
                chosen = _next_chosen(z_N, chosen)
                state[_HITS] += (marks_N[chosen] & (RAISED | FORCED)) != 0
            state[_SLOTS] += state[_TOP_K]


@njit(error_model="numpy")
def _count_node(state, row, tensor, steered):
    """Count the experts that one layer chose, from llama.cpp's own choice [T, k]."""
    top_k = word(tensor + state[_AT_NE])
    tokens = word(tensor + state[_AT_NE] + 8)
    stride = word(tensor + state[_AT_NB] + 8)
    every, outputs, routers, experts = state[_TOKENS], state[_OUTPUTS], state[_ROUTERS], state[_EXPERTS]
    if tokens not in (every, outputs):
        state[_PROBLEM] = PROBLEM_SHAPE
        return
    counted_L = carray(pointer(state[_A_COUNTED]), (routers,), np.uint8)
    if counted_L[row] != 0:  # grovemoe takes its choice twice
        return
    counted_L[row] = 1
    data = word(tensor + state[_AT_DATA])
    if ask_host(state[_IS_HOST], _buffer(state, tensor)) == 0:
        data = state[_A_SCRATCH]
        copy_tensor(state[_GET], tensor, data, (tokens - 1) * stride + 4 * top_k)
    number_T = carray(pointer(state[_A_NUMBER]), (every,), np.int32)
    factor_T = carray(pointer(state[_A_FACTOR]), (every,), np.float32)
    text_T = carray(pointer(state[_A_TEXT]), (every,), np.int32)
    output_T = carray(pointer(state[_A_OUTPUT]), (max(outputs, 1),), np.int32)
    for t in range(tokens):
        token = t if tokens == every else output_T[t]
        chosen_k = carray(pointer(data + t * stride), (top_k,), np.int32)
        number, text = number_T[token], text_T[token]
        if state[_HAS_TRACE] != 0:
            slot = carray(pointer(state[_A_SLOT]), (every,), np.int32)[token]
            if slot >= 0:
                start = state[_A_CHOSEN] + 4 * top_k * (slot * routers + row)
                kept_k = carray(pointer(start), (top_k,), np.int32)
                for k in range(top_k):
                    kept_k[k] = chosen_k[k]
        if state[_HAS_TEXTS] != 0 and text >= 0:
            counts_N = carray(pointer(state[_A_COUNTS] + 8 * (text * routers + row) * experts), (experts,), np.int64)
            for expert in chosen_k:
                if 0 <= expert < experts:
                    counts_N[expert] += 1
        if steered and number >= 0 and factor_T[token] != 0:
            marks_N = carray(pointer(state[_A_MARKS] + (number * routers + row) * experts), (experts,), np.uint8)
            for expert in chosen_k:
                if 0 <= expert < experts:
                    state[_HITS] += (marks_N[expert] & (RAISED | FORCED)) != 0
            state[_SLOTS] += top_k


@njit(error_model="numpy")
def _keep_lists(marks_N, order_N):
    """Move forced experts to the front and banned ones to the end; all others keep their order."""
    front, end = 0, len(order_N) - 1
    for n in range(len(order_N)):
        expert = order_N[n]
        if marks_N[expert] & FORCED:
            for m in range(n, front, -1):
                order_N[m] = order_N[m - 1]
            order_N[front] = expert
            front += 1
    for n in range(len(order_N) - 1, -1, -1):
        expert = order_N[n]
        if marks_N[expert] & BANNED:
            for m in range(n, end):
                order_N[m] = order_N[m + 1]
            order_N[end] = expert
            end -= 1


@njit(error_model="numpy")
def _order_node(state, row, tensor):
    """Make one layer's order of all experts [T, N] keep to the lists, and count what they achieve."""
    experts = word(tensor + state[_AT_NE])
    tokens = word(tensor + state[_AT_NE] + 8)
    every, outputs, routers, top_k = state[_TOKENS], state[_OUTPUTS], state[_ROUTERS], state[_TOP_K]
    if experts != state[_EXPERTS] or tokens not in (every, outputs):
        state[_PROBLEM] = PROBLEM_SHAPE
        return
    if word(tensor + state[_AT_NB]) != 4 or word(tensor + state[_AT_NB] + 8) != 4 * experts:
        state[_PROBLEM] = PROBLEM_TYPE
        return
    is_host = ask_host(state[_IS_HOST], _buffer(state, tensor)) != 0
    data = word(tensor + state[_AT_DATA]) if is_host else state[_A_SCRATCH]
    if not is_host:
        copy_tensor(state[_GET], tensor, data, 4 * tokens * experts)
    order_TN = carray(pointer(data), (tokens, experts), np.int32)
    number_T = carray(pointer(state[_A_NUMBER]), (every,), np.int32)
    factor_T = carray(pointer(state[_A_FACTOR]), (every,), np.float32)
    output_T = carray(pointer(state[_A_OUTPUT]), (max(outputs, 1),), np.int32)
    ordered_L = carray(pointer(state[_A_ORDERED]), (routers,), np.int64)
    ordered_L[row] += 1
    for t in range(tokens):
        token = t if tokens == every else output_T[t]
        number = number_T[token]
        if number < 0 or factor_T[token] == 0:
            continue
        marks_N = carray(pointer(state[_A_MARKS] + (number * routers + row) * experts), (experts,), np.uint8)
        _keep_lists(marks_N, order_TN[t])
        if ordered_L[row] > 1:  # grovemoe takes its choice twice
            continue
        for n in range(experts):
            marks = marks_N[order_TN[t, n]]
            state[_FORCED_PLACES] += (marks & FORCED) != 0
            state[_BANNED_PLACES] += (marks & BANNED) != 0
            if n < top_k:
                state[_FORCED_HITS] += (marks & FORCED) != 0
                state[_BANNED_HITS] += (marks & BANNED) != 0
    if not is_host:
        copy_tensor(state[_SET], tensor, data, 4 * tokens * experts)


@njit(error_model="numpy")
def _buffer(state, tensor):
    """The backend buffer of a tensor, or of the tensor that it is a view of."""
    return word(tensor + state[_AT_BUFFER])


@njit(error_model="numpy")
def _kind_of(state, tensor):
    """A node's kind (LOGITS, BIASED, ...) and decoder layer, from its name; (-1, -1) for all others."""
    start = tensor + state[_AT_NAME]
    if word(start) != FFN_MOE:
        return -1, -1
    name = carray(pointer(start), (NAME_BYTES,), np.uint8)
    kind, at = -1, 8
    if name[8] == 108 and name[9] == 111 and name[13] == 115:  # "lo", "s": logits
        if name[14] == 45:  # "-"
            kind, at = LOGITS, 15
        elif name[14] == 95 and name[15] == 98 and name[21] == 45:  # "_b", "-": logits_biased
            kind, at = BIASED, 22
    elif name[8] == 112 and name[9] == 114 and name[12] == 115 and name[13] == 45:  # "pr", "s-": probs
        kind, at = PROBABILITIES, 14
    elif name[8] == 97 and name[9] == 114 and name[14] == 116 and name[15] == 45:  # "ar", "t-": argsort
        kind, at = ORDER, 16
    elif name[8] == 116 and name[9] == 111 and name[11] == 107 and name[12] == 45:  # "to", "k-": topk
        kind, at = TOP_K, 13
    if kind < 0:
        return -1, -1
    layer = 0
    while 48 <= name[at] <= 57:
        layer = 10 * layer + name[at] - 48
        at += 1
    if name[at] != 0:  # such as "ffn_moe_probs-3 (reshaped)"
        return -1, -1
    return kind, layer


@njit(error_model="numpy")
def _router_of(state, tensor):
    """A node's kind and the router that it belongs to; (-1, -1) if it is of no use here."""
    if state[_IN_GRAPH] != 0 and state[_FROM_TOPK] == 0 and state[_ANY_LISTED] == 0:
        # llama.cpp reads the operation anyway, but not the name, which would have to come from memory
        op = half_word(tensor + state[_AT_OP])
        if op != state[_OP_SOFTMAX] and op != state[_OP_UNARY] and op != state[_OP_CUSTOM]:
            return -1, -1
    kind, layer = _kind_of(state, tensor)
    if kind < 0 or layer > state[_MAX_LAYER]:
        return -1, -1
    return kind, carray(pointer(state[_A_ROW]), (state[_MAX_LAYER] + 1,), np.int32)[layer]


@njit(error_model="numpy")
def _on_node(tensor, asks, state):
    kind, row = _router_of(state, tensor)
    if row < 0:
        return asks == 0
    active = carray(pointer(state[_A_ACTIVE]), (state[_ROUTERS],), np.uint8)[row] != 0
    if kind == PROBABILITIES and state[_IN_GRAPH] != 0 and state[_KIND] != PROBABILITIES:
        if asks != 0:
            _switch(state, row, tensor, active)
        return asks == 0
    if kind == ORDER:
        is_listed = carray(pointer(state[_A_LISTED]), (state[_ROUTERS],), np.uint8)[row] != 0
        if asks == 0 and is_listed:
            _order_node(state, row, tensor)
        return is_listed if asks != 0 else True
    if kind == TOP_K:
        wanted = state[_FROM_TOPK] != 0 and (active or state[_HAS_TEXTS] != 0 or state[_HAS_TRACE] != 0)
        if asks == 0 and wanted:
            _count_node(state, row, tensor, active)
            return row != state[_STOP_AFTER]
        return wanted if asks != 0 else True
    wanted = kind == state[_KIND] and active and state[_IN_GRAPH] == 0
    if asks == 0 and wanted:
        _edit_computed(state, row, tensor)
    return wanted if asks != 0 else True


@njit(error_model="numpy")
def _edit_computed(state, row, tensor):
    """Steer logits that have just been computed, in place or through the backend."""
    experts = word(tensor + state[_AT_NE])
    tokens = word(tensor + state[_AT_NE] + 8)
    if word(tensor + state[_AT_NB]) != 4 or word(tensor + state[_AT_NB] + 8) != 4 * experts:
        state[_PROBLEM] = PROBLEM_TYPE
        return
    if ask_host(state[_IS_HOST], _buffer(state, tensor)) != 0:
        _edit_node(state, row, carray(pointer(word(tensor + state[_AT_DATA])), (tokens, experts), np.float32))
        return
    size = 4 * tokens * experts
    copy_tensor(state[_GET], tensor, state[_A_SCRATCH], size)
    _edit_node(state, row, carray(pointer(state[_A_SCRATCH]), (tokens, experts), np.float32))
    copy_tensor(state[_SET], tensor, state[_A_SCRATCH], size)


# ---- in the graph ----


@njit(error_model="numpy")
def _write_address(words, at, number):
    """Write 64 bits as two words, since ggml aligns a node's parameters to 32 bits."""
    words[at] = np.int32(number & 0xFFFFFFFF)
    words[at + 1] = np.int32(number >> 32)


@njit(error_model="numpy")
def _switch(state, row, tensor, active):
    """Turn the node that computes probabilities into a custom operation if its layer is steered, and back if not."""
    op = carray(pointer(tensor + state[_AT_OP]), (1,), np.int32)
    saved = carray(pointer(state[_A_SAVED] + 8 * SAVED * row), (SAVED,), np.int64)
    params = carray(pointer(tensor + state[_AT_OP_PARAMS]), (PARAMETERS,), np.int32)
    if op[0] == state[_OP_CUSTOM]:
        op[0] = saved[0]
        for i in range(PARAMETERS):
            params[i] = saved[1 + i]
    if not active:
        return
    is_sigmoid = op[0] == state[_OP_UNARY] and half_word(tensor + state[_AT_OP_PARAMS]) == state[_UNARY_SIGMOID]
    if op[0] != state[_OP_SOFTMAX] and not is_sigmoid:
        state[_PROBLEM] = PROBLEM_TYPE
        return
    saved[0] = op[0]
    for i in range(PARAMETERS):
        saved[1 + i] = params[i]
    op[0] = state[_OP_CUSTOM]
    _write_address(params, 0, state[_CUSTOM_EDIT])
    _write_address(params, 2, 1)  # one task: a router's logits are too few to split
    _write_address(params, 4, state[_A_STATE])


@njit(error_model="numpy")
def _edit_in_graph(target, source, state):
    _, layer = _kind_of(state, target)
    row = carray(pointer(state[_A_ROW]), (state[_MAX_LAYER] + 1,), np.int32)[layer]
    experts = word(source + state[_AT_NE])
    tokens = word(source + state[_AT_NE] + 8)
    z_TN = carray(pointer(word(source + state[_AT_DATA])), (tokens, experts), np.float32)
    p_TN = carray(pointer(word(target + state[_AT_DATA])), (tokens, experts), np.float32)
    source_L = carray(pointer(state[_A_SOURCE]), (state[_ROUTERS],), np.int64)
    if source_L[row] != source:  # grovemoe makes probabilities of the same logits twice
        source_L[row] = source
        _edit_node(state, row, z_TN)
    is_softmax = carray(pointer(state[_A_SAVED] + 8 * SAVED * row), (1,), np.int64)[0] == state[_OP_SOFTMAX]
    for t in range(tokens):
        if is_softmax:
            largest = z_TN[t].max()
            total = 0.0
            for n in range(experts):
                p = np.exp(z_TN[t, n] - largest)
                p_TN[t, n] = p
                total += p
            scale = np.float32(1.0 / total)
            for n in range(experts):
                p_TN[t, n] *= scale
        else:
            for n in range(experts):
                p_TN[t, n] = np.float32(1) / (np.float32(1) + np.exp(-z_TN[t, n]))


@cfunc(types.uint8(types.int64, types.uint8, types.int64), cache=True, error_model="numpy")
def on_node(tensor, asks, state):
    """llama.cpp's eval callback: bool (struct ggml_tensor *, bool ask, void * user_data)."""
    return np.uint8(_on_node(tensor, asks, carray(pointer(state), (len(_FIELDS),), np.int64)))


@cfunc(types.void(types.int64, types.int64, types.int32, types.int32, types.int64), cache=True, error_model="numpy")
def edit_in_graph(target, source, thread, threads, state):
    """A custom operation of ggml with one source: void (dst, a, ith, nth, userdata)."""
    if thread == 0:
        _edit_in_graph(target, source, carray(pointer(state), (len(_FIELDS),), np.int64))
