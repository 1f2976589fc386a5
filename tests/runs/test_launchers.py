"""How the processes of a run are laid out."""

import pytest

from npo_core.runs.launchers import Launcher, launcher_names, read_launcher


@pytest.mark.parametrize(
    ("name", "layout"),
    [("", (1, 1, False)), ("one_gpu", (1, 1, False)), ("two_cpu", (2, 1, False)), ("one_node", (8, 1, True)),
     ("one_node_whole", (8, 1, False)), ("four_nodes", (32, 4, True))],
)  # fmt: skip
def test_launchers_that_ship(name, layout):
    found = read_launcher(name)
    assert (found.processes, found.machines, found.sharded) == layout
    assert name in ("", *launcher_names())


def test_a_launcher_of_ones_own(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("distributed_type: MULTI_GPU\nnum_machines: 2\nnum_processes: 16\n")
    assert read_launcher(str(file)) == Launcher(processes=16, machines=2, sharded=False, file=file)
    for other in ("DEEPSPEED", "FSDP"):
        file.write_text(f"distributed_type: {other}\nnum_machines: 1\nnum_processes: 8\n")
        with pytest.raises(ValueError, match=rf"has distributed_type {other}.*could not be rolled back to"):
            read_launcher(str(file))
    file.write_text("num_machines: 2\n")
    with pytest.raises(ValueError, match=r"says nothing about num_processes, distributed_type"):
        read_launcher(str(file))
    with pytest.raises(ValueError, match=r"did you mean 'one_node'.*one_gpu, one_node, one_node_whole, two_cpu"):
        read_launcher("one_nod")
