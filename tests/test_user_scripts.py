"""Scripts as users wrote them run unmodified, where they lie beside the repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "user_scripts"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("svi_iwae", ["nats per datum", "held out"]),
        ("vae_to_arviz", ["FitResult(VAE", "log p(x) ≥|≈", "z[z0]|z0"]),
        ("energy_factor", ["check says: unhandled-normalizer", "log Z ≈", "posterior", "mean log p - log q"]),
        ("flow_prior_nuts", ["coef[0]", "elpd_loo", "(good)"]),
        ("diffusion_inverse", ["sliced Wasserstein ≈", "log p = -2.6", "x[0]"]),
    ],
)
def test_script(name: str, said: list[str], tmp_path: Path) -> None:
    script = FOLDER / f"{name}.py"
    if not script.exists():
        pytest.skip(f"{script} is not here")
    run = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    for choices in said:
        assert any(choice in run.stdout for choice in choices.split("|")), run.stdout
    if name == "vae_to_arviz":
        assert (tmp_path / "vae.nc").stat().st_size > 0
        assert (tmp_path / "vae_samples.png").stat().st_size > 0
        assert (tmp_path / "vae_run" / "weights.pt").stat().st_size > 0
