"""Training spread over processes: what one process computes, at any number of them.

Each launch runs the set-ups of several families, as starting takes time.
"""

from pathlib import Path

from tests.support.torchrun import torchrun

DATA_PARALLEL = ("replicated", "fsdp1", "fsdp2", "fsdp2_files", "fsdp2_verbs", "quantised")
PARTS_OF_A_MODEL = (
    "tensor_parallel", "tensor_parallel_verbs", "tensor_parallel_weights", "pipeline", "meta")
HUGGING_FACE = ("huggingface", "transformers_tp_plan")

# Those that a number of processes could make a difference to; the others run in two.
IN_FOUR = (
    "replicated.losses_and_what_is_reduced", "fsdp1.hybrid_sharding",
    "fsdp1.files_are_those_of_one_process", "fsdp2.every_linear_by_itself",
    "fsdp2.rows_transposed_and_experts", "fsdp2_files.saved_files_are_the_same_bytes",
    "fsdp2_verbs.sharded_within_replicas", "tensor_parallel.linears_in_both_orders",
    "tensor_parallel.fsdp2_on_top", "pipeline.stages_cut_by_hand",
)


def run(modules: tuple[str, ...], processes: int, *names: str) -> set[str]:
    """The names of the set-ups that ran."""
    return set(torchrun([f"sharded.{module}" for module in modules], processes, *names))


def modules_of(ran: set[str]) -> set[str]:
    """The modules of set-ups."""
    return {name.partition(".")[0] for name in ran}


def test_data_parallel_in_two_processes() -> None:
    assert modules_of(run(DATA_PARALLEL, 2)) == {*DATA_PARALLEL}


def test_parts_of_a_model_in_two_processes() -> None:
    assert modules_of(run(PARTS_OF_A_MODEL, 2)) == {*PARTS_OF_A_MODEL}


def test_all_in_four_processes() -> None:
    assert run(DATA_PARALLEL + PARTS_OF_A_MODEL, 4, *IN_FOUR) == {*IN_FOUR}


def test_hugging_face_in_two_processes() -> None:
    assert modules_of(run(HUGGING_FACE, 2)) == {*HUGGING_FACE}


def test_no_module_is_left_out() -> None:
    there = {path.stem for path in Path(__file__).parent.glob("[!_]*.py")} - {Path(__file__).stem}
    assert there == {*DATA_PARALLEL, *PARTS_OF_A_MODEL, *HUGGING_FACE}
