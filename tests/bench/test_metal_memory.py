"""The simulated memory of an image tower on a Mac."""

from bench.metal_memory import Machine, simulate


def test_buffers_are_held_until_their_command_buffer_is_done() -> None:
    machine = Machine(keeps_up=False)
    machine.allocate(1, 100)
    machine.hold(1)
    machine.run([1], {1: 100})
    machine.drop(1)
    assert machine.live == 100
    machine.wait_for(machine.commit())
    assert (machine.live, machine.peak, machine.committed) == (0, 100, 1)


def test_image_of_1024_px_needs_little_beside_the_weights() -> None:
    at_once, pieces = (simulate("fastvithd", 1024, 1, p, keeps_up=False) for p in (False, True))
    assert at_once.peak > 0.7e9
    assert pieces.peak < 0.4e9
    assert pieces.committed < 1.25 * at_once.committed
