"""A new Python may have instructions that lorafx does not know: then these tests say which.

What is not known is refused, so that all is right, but no layer would be a region any more.
"""

import dis
import sys

from torch import nn

import lorafx
from lorafx._graph.watch import DECISIONS, STRAIGHT

# Instructions, of Python 3.11 to 3.14, that are neither straight-line code nor named in DECISIONS:
# of classes, generators, coroutines, patterns, exceptions, and of the interpreter itself.
OTHERS = frozenset("""
    ANNOTATIONS_PLACEHOLDER ASYNC_GEN_WRAP BEFORE_ASYNC_WITH BEFORE_WITH
    BINARY_OP_INPLACE_ADD_UNICODE BUILD_INTERPOLATION BUILD_STRING BUILD_TEMPLATE CALL_INTRINSIC_2
    CHECK_EG_MATCH CHECK_EXC_MATCH
    CLEANUP_THROW CONVERT_VALUE DICT_UPDATE END_ASYNC_FOR END_FOR ENTER_EXECUTOR EXIT_INIT_CHECK
    GET_AITER GET_ANEXT GET_AWAITABLE GET_LEN INTERPRETER_EXIT LOAD_ASSERTION_ERROR LOAD_BUILD_CLASS
    LOAD_CLASSDEREF LOAD_CLOSURE LOAD_COMMON_CONSTANT LOAD_CONST_IMMORTAL LOAD_CONST_MORTAL
    LOAD_FAST_AND_CLEAR LOAD_FROM_DICT_OR_DEREF LOAD_FROM_DICT_OR_GLOBALS LOAD_LOCALS LOAD_NAME
    LOAD_SPECIAL LOAD_SUPER_METHOD LOAD_ZERO_SUPER_ATTR LOAD_ZERO_SUPER_METHOD MAP_ADD MATCH_CLASS
    MATCH_KEYS MATCH_MAPPING MATCH_SEQUENCE POP_BLOCK POP_EXCEPT POP_ITER PRINT_EXPR PUSH_EXC_INFO
    RESERVED RETURN_GENERATOR SETUP_CLEANUP SETUP_FINALLY SETUP_WITH STORE_DEREF
    STORE_FAST_MAYBE_NULL STORE_NAME TO_BOOL UNARY_NOT UNARY_POSITIVE WITH_EXCEPT_START
""".split())


def test_every_instruction_of_this_python_is_classified():
    known = STRAIGHT | OTHERS
    unknown = [
        name
        for name in dis.opmap
        if name not in known
        and not name.startswith("INSTRUMENTED_")
        and not any(part in name for part in DECISIONS)
    ]
    assert not unknown, (
        f"Python {sys.version_info.major}.{sys.version_info.minor} has new instructions: those of "
        f"straight-line code belong into STRAIGHT of lorafx/_graph/watch.py, others here: {unknown}"
    )


def test_a_linear_layer_is_a_region():
    model = lorafx.inject(nn.Linear(4, 4))
    missing = {step.opname for step in dis.get_instructions(nn.Linear.forward)} - STRAIGHT
    breaks = dict(lorafx.summary(model).breaks)
    assert not breaks, (
        f"nn.Linear is a graph break on Python {sys.version_info.major}.{sys.version_info.minor}: "
        f"{breaks}. Instructions of its forward that lorafx/_graph/watch.py lacks in STRAIGHT: "
        f"{sorted(missing) or 'none'}."
    )
    assert "adapted_linear" in model.code
