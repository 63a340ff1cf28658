"""The LoRA field in a real browser: what is chosen there is in the picture and in the lines that make it again."""

from __future__ import annotations

import json

import pytest

from tests.app.conftest import visits
from tests.app.test_page import ended, search

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture
def style(tmp_path):
    """A LoRA file of the embedded model, which changes what it paints."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    from ttsnap.pipelines.loading import Loading, load

    pipe = load("shapes", Loading(device="cpu")).pipe
    name = next(n for n, m in pipe.transformer.named_modules() if n.endswith("attn.to_q"))
    layer, random = pipe.transformer.get_submodule(name), torch.Generator().manual_seed(0)
    weights = {
        f"transformer.{name}.lora_A.weight": torch.randn(2, layer.in_features, generator=random),
        f"transformer.{name}.lora_B.weight": torch.randn(layer.out_features, 2, generator=random),
    }
    save_file(weights, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


def test_a_chosen_lora_is_in_the_picture_and_in_its_lines(browser, style, tmp_path):
    from ttsnap.app.searches import Searches
    from ttsnap.app.server import serve

    shown, url = serve(Searches(tmp_path / "out", loras=[str(style)]), port=None, block=False)
    try:
        with visits(browser, url.rstrip("/")) as visit:
            page = visit()
            rewards = []
            for chosen in (False, True):
                if chosen:
                    page.get_by_role("button", name="Model, reward, seed, size, guidance").first.click()
                    page.get_by_label("LoRAs").first.click()
                    page.get_by_role("option", name="style").click()
                    page.keyboard.press("Escape")
                search(page, prompt="a red circle left of a blue square", amount=2)
                said = "load_lora_weights" if chosen else "manual_seed("
                page.locator(".cm-content").filter(has_text=said).first.wait_for()  # not what the last search said
                ended(page)
                with page.expect_download() as download:
                    page.get_by_role("button", name="result.json").or_(
                        page.get_by_role("link", name="result.json")
                    ).first.click()
                record = json.loads(download.value.path().read_text())
                rewards.append(record["reward"])
                assert ("load_lora_weights" in record["reproduce"]) == chosen
            assert rewards[0] != rewards[1]
    finally:
        shown.close()
