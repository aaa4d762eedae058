"""torch.compile of a whole fused model, as deep as the configurations of the benchmarks."""

import time

import pytest
import torch
from training import adamw, build, draw

pytestmark = pytest.mark.gpu  # Inductor's code is for a GPU


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_deep_model_compiles(mode):
    """The time does not double with each layer, and the steps are those of the eager model."""
    torch.compiler.reset()
    models = [build(depth=8, impl="fused"), build(depth=8, impl="fused")]
    compiled = torch.compile(models[0], fullgraph=True, mode=mode)
    start, losses = time.perf_counter(), []
    for model, optimizer in zip((compiled, models[1]), map(adamw, models), strict=True):
        for n in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast("cuda", torch.bfloat16):
                loss, _ = model(draw(n), return_loss=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
    assert time.perf_counter() - start < 240
    torch.testing.assert_close(losses[:4], losses[4:], rtol=2e-2, atol=0)
