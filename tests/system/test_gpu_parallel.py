"""Two GPUs that share a model: the ids of one GPU, by CUDA graphs and without, greedy and drawn."""

from pathlib import Path

import pytest
import tiny
import torch

from actorserve import Engine, SamplingParams

if torch.cuda.device_count() < 2:
    pytest.skip("needs two GPUs", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
PROMPTS = [tiny.prompt(length, seed=length) for length in (3, 40, 90, 17, 64)]


def generate(folder: str, temperature: float, **options: object) -> list[list[int]]:
    settings = {"skip_tokenizer_init": True, "device": "cuda", "max_total_tokens": 16384, "dtype": "float32"} | options
    params = SamplingParams(temperature=temperature, seed=3, max_new_tokens=40, ignore_eos=True)
    with Engine.sync(folder, **settings) as engine:
        twice = [engine.generate(PROMPTS, params) for _ in range(2)]  # the second time from cached prefixes
    assert [list(o.ids) for o in twice[0]] == [list(o.ids) for o in twice[1]]
    return [list(o.ids) for o in twice[0]]


@pytest.fixture(scope="module", params=["llama", "gemma2", "llama-3.1"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Wide enough heads for the GPU's kernels; llama-3.1 has one KV head for both ranks."""
    model = tiny.build(request.param, hidden_size=384, head_dim=64, intermediate_size=512, initializer_range=0.05)
    folder: Path = tmp_path_factory.mktemp("model")
    return tiny.save(model, folder)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("disable_cuda_graph", [False, True])
def test_two_gpus_say_what_one_does(folder: str, temperature: float, disable_cuda_graph: bool) -> None:
    options = {"disable_cuda_graph": disable_cuda_graph}
    assert generate(folder, temperature, tp_size=2, **options) == generate(folder, temperature, **options)
