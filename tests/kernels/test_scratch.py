import threading

import torch

from qtune_kernels.scratch import scratch


def test_a_buffer_is_kept_and_grows() -> None:
    first = scratch("grows", 100, torch.float32)
    assert first.shape == (100,) and first.dtype == torch.float32
    assert scratch("grows", 50, torch.bfloat16).data_ptr() == first.data_ptr()
    assert scratch("grows", 1000, torch.float32).numel() == 1000


def test_roles_and_threads_do_not_share() -> None:
    mine = scratch("mine", 100, torch.float32)
    found = [scratch("other", 100, torch.float32)]
    thread = threading.Thread(target=lambda: found.append(scratch("mine", 100, torch.float32)))
    thread.start()
    thread.join()
    assert len({mine.data_ptr(), *(buffer.data_ptr() for buffer in found)}) == 3


def test_a_buffer_made_in_inference_mode_is_writable_afterwards() -> None:
    with torch.inference_mode():
        scratch("inference", 10, torch.float32)
    scratch("inference", 10, torch.float32).fill_(1.0)
