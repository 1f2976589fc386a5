"""Imports without a search for garbage: it goes on afterwards, and only in a process of ours something is left out."""

import gc

import pytest

from npo_core import __main__ as command
from npo_core.loading import loading


@pytest.fixture
def frozen(monkeypatch):
    """How often what is there was left out of later searches."""
    calls = []
    monkeypatch.setattr(gc, "freeze", lambda: calls.append(gc.isenabled()))
    return calls


@pytest.mark.parametrize("own", [True, False])
def test_the_search_goes_on_after_the_imports(frozen, own):
    with loading(own):
        assert not gc.isenabled()
    assert gc.isenabled()
    assert frozen == [False] * own, "left out before the next search begins"


def test_it_goes_on_after_an_import_that_fails(frozen):
    with pytest.raises(ModuleNotFoundError), loading(False):
        import nothing_of_this_name  # noqa: F401
    assert gc.isenabled()


def test_who_had_turned_it_off_finds_it_off(frozen):
    gc.disable()
    try:
        with loading(False):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_command_that_is_called_from_another_process_leaves_that_ones_garbage_alone(frozen, tmp_path, capsys):
    assert command.main(["cell", "--config", str(tmp_path / "nowhere.json")]) == 2
    assert "nowhere.json" in capsys.readouterr().err
    assert frozen == [] and gc.isenabled()
