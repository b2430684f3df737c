"""FSDP2, in processes: what one process computes, at any number of them."""

from tests.support.torchrun import torchrun

# Those that a number of processes could make a difference to; the others run in two.
IN_FOUR = (
    "each_layer_then_the_root", "every_linear_by_itself", "modules_trained_whole",
    "rows_transposed_and_experts", "mixed_precision", "gradients_reduced_are_the_adapters",
    "saved_files_are_the_same_bytes", "an_error_of_the_first_process_is_raised_in_all",
    "a_run_is_resumed", "an_adapter_added_later_trains", "sharded_within_replicas",
    "merged_and_ejected", "refused_when_sharded",
)


def test_set_ups_of_fsdp2_in_two_processes() -> None:
    assert torchrun("tests.sharded.fsdp2", 2).keys() >= {*IN_FOUR}


def test_set_ups_of_fsdp2_in_four_processes() -> None:
    assert torchrun("tests.sharded.fsdp2", 4, *IN_FOUR)
