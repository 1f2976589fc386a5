"""What is added to TRL's use of vLLM, as far as it can be tested without vLLM; the rest is in test_vllm.py."""

from types import SimpleNamespace

import pytest
from trl.generation import vllm_generation

from npo_core.trainer.pictures import picture_limits
from npo_core.trainer.vllm import engine_of, one_engine, trainer_generate


class Engine:
    """Counts how often it is sent to sleep; asleep it refuses to be sent again, as vLLM does."""

    def __init__(self):
        self.asleep = False
        self.llm_engine = SimpleNamespace(is_sleeping=lambda: self.asleep)

    def sleep(self, level):
        assert not self.asleep, "asleep already"
        self.asleep = True


def test_a_later_trainer_takes_over_the_engine(monkeypatch):
    made = []
    monkeypatch.setattr(vllm_generation, "LLM", lambda **settings: made.append(settings) or Engine(), raising=False)
    with one_engine("colocate", None):
        first = vllm_generation.LLM(model="a")
    first.sleep(level=2)
    with one_engine("colocate", first):
        second = vllm_generation.LLM(model="a")
        second.sleep(level=2)  # TRL sends the engine that it takes for a fresh one to sleep
    assert len(made) == 1, "a second engine was started"
    assert second.llm_engine is first.llm_engine
    first.asleep = False
    with one_engine("colocate", second):
        third = vllm_generation.LLM(model="a")
        third.sleep(level=2)
    assert first.asleep and third._engine is first
    assert vllm_generation.LLM(model="b") is not first and len(made) == 2


def test_picture_sizes_are_told_to_an_engine_that_is_started(monkeypatch):
    made = []
    monkeypatch.setattr(vllm_generation, "LLM", lambda **settings: made.append(settings), raising=False)
    with one_engine("colocate", None, **picture_limits(256, 0)):
        vllm_generation.LLM(model="a")
    with one_engine("colocate", None, **picture_limits(0, 0)):
        vllm_generation.LLM(model="a")
    assert made == [{"model": "a", "mm_processor_kwargs": {"min_pixels": 256}}, {"model": "a"}]


def test_the_engine_is_given_back_when_a_trainer_cannot_be_made(monkeypatch):
    monkeypatch.setattr(vllm_generation, "LLM", Engine, raising=False)
    with pytest.raises(ValueError, match="no such data"), one_engine("colocate", Engine()):
        raise ValueError("no such data")
    assert vllm_generation.LLM is Engine


def test_a_later_trainer_takes_over_the_connection_to_the_server(monkeypatch):
    opened = []

    class Client:
        def __init__(self, **settings):
            opened.append(settings)

        def init_communicator(self, device):
            assert not hasattr(self, "channel"), "the channel for weights was opened twice"
            self.channel = device

    monkeypatch.setattr(vllm_generation, "VLLMClient", Client)
    with one_engine("server", None, **picture_limits(256, 0)):
        first = vllm_generation.VLLMClient(base_url="a")
    first.init_communicator(device="cpu")
    with one_engine("server", first):
        second = vllm_generation.VLLMClient(base_url="a")
        second.init_communicator(device="cpu")
    assert opened == [{"base_url": "a"}] and second.channel == "cpu"
    with one_engine("off", None):
        assert vllm_generation.VLLMClient is Client


def test_what_is_kept_of_a_trainer():
    generation = SimpleNamespace(llm="engine", vllm_client="client")
    trainer = SimpleNamespace(use_vllm=True, vllm_mode="colocate", vllm_generation=generation)
    assert engine_of(trainer) == "engine"
    trainer.vllm_mode = "server"
    assert engine_of(trainer) == "client"
    del generation.vllm_client  # processes that do not write have none
    assert engine_of(trainer) is None
    assert engine_of(SimpleNamespace(use_vllm=False)) is None


def test_without_vllm_transformers_samples():
    assert trainer_generate(SimpleNamespace(use_vllm=False)) is None
