"""exact_metrics.py against independent implementations, and the statuses of metrics.py.

Values of pyiqa are stored here, and compared with pyiqa itself where it is installed.
"""

import re

import cv2
import numpy as np
import pytest
import skimage.data
from scipy.linalg import sqrtm
from skimage.metrics import structural_similarity

from teasr.evaluation.metrics import Scorer
from teasr.evaluation.registry import METRICS, PROTOCOLS, File, Metric
from teasr.imaging.exact_metrics import frechet_distance, luma, psnr, ssim

# pyiqa 0.1.16 on `pair` with noise 2 and 20: test_y_channel=True, color_space='ycbcr'; the same with crop_border=4;
# test_y_channel=False
PYIQA = {
    ("osediff", 2): {"psnr": 46.8381538, "ssim": 0.99187},
    ("crop4", 2): {"psnr": 46.832016, "ssim": 0.9920206},
    ("rgb", 2): {"psnr": 42.0000153, "ssim": 0.981757},
    ("osediff", 20): {"psnr": 26.9715691, "ssim": 0.6307402},
    ("crop4", 20): {"psnr": 26.968914, "ssim": 0.6343561},
    ("rgb", 20): {"psnr": 22.155344, "ssim": 0.4379823},
}


@pytest.fixture(params=[2, 20])
def pair(request):
    hq = skimage.data.chelsea()[:200, :300]
    noise = np.random.default_rng(0).normal(0, request.param, hq.shape)
    return hq, (hq + noise).clip(0, 255).round().astype(np.uint8), request.param


def test_luma_range():
    assert luma(np.zeros((1, 1, 3), np.uint8)).item() == 16
    assert luma(np.full((1, 1, 3), 255, np.uint8)).item() == pytest.approx(235)


def test_psnr_is_its_definition(pair):
    hq, made, _ = pair
    a, b = (0.257 * x[..., 0] + 0.504 * x[..., 1] + 0.098 * x[..., 2] for x in (p.astype(float) for p in (hq, made)))
    assert psnr(hq, made) == pytest.approx(20 * np.log10(255 / np.sqrt(np.mean((a - b) ** 2))), abs=0.02)
    rgb = 20 * np.log10(255 / np.sqrt(np.mean((hq.astype(float) - made) ** 2)))
    assert psnr(hq, made, on_luma=False) == pytest.approx(rgb, abs=1e-3)
    assert psnr(hq, hq) == pytest.approx(80)


def test_ssim_equals_scikit_image(pair):
    hq, made, _ = pair
    settings = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "full": True}
    _, full = structural_similarity(*(luma(x).round() for x in (hq, made)), **settings)
    assert ssim(hq, made) == pytest.approx(full[5:-5, 5:-5].mean(), abs=2e-5)
    _, full = structural_similarity(hq.astype(float), made.astype(float), channel_axis=2, **settings)
    assert ssim(hq, made, on_luma=False) == pytest.approx(full[5:-5, 5:-5].mean(), abs=2e-5)
    assert ssim(hq, hq) == pytest.approx(1)


@pytest.mark.parametrize("protocol", ["osediff", "crop4", "rgb"])
def test_protocols_are_pyiqas(pair, protocol):
    """The protocols of the published tables agree to three digits more than these tables print."""
    hq, made, noise = pair
    scores = Scorer(["psnr", "ssim"], protocol).picture(made, hq)
    for name, tolerance in (("psnr", 3e-5), ("ssim", 2e-6)):
        assert scores[name] == pytest.approx(PYIQA[protocol, noise][name], abs=tolerance)


def test_the_installed_pyiqa_agrees(pair):
    """Runs only where the non-commercial extra is installed."""
    pyiqa = pytest.importorskip("pyiqa", reason="the `metrics` extra is not installed (PolyForm Noncommercial)")
    import torch

    hq, made, noise = pair
    a, b = (torch.from_numpy(x).permute(2, 0, 1)[None].float() / 255 for x in (hq, made))
    for protocol in PROTOCOLS.values():
        settings = {"test_y_channel": protocol.luma, "crop_border": protocol.border_px, "color_space": "ycbcr"}
        for name in ("psnr", "ssim"):
            metric = pyiqa.create_metric(name, **settings, device=torch.device("cpu"))
            assert metric(b, a).item() == pytest.approx(PYIQA[protocol.name, noise][name], abs=1e-5)


@pytest.mark.parametrize(("n", "m", "width"), [(20, 30, 64), (50, 20, 200), (400, 300, 24), (40, 300, 64)])
def test_frechet_distance_is_its_definition(n, m, width):
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(width, width)) / width**0.5
    a, b = rng.normal(size=(n, width)) @ mix, rng.normal(size=(m, width)) * 1.5 + 0.3
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    gap = a.mean(0) - b.mean(0)
    wanted = gap @ gap + np.trace(s1) + np.trace(s2) - 2 * np.trace(sqrtm(s1 @ s2)).real
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-3)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="at least 2 features"):
        frechet_distance(a[:1], b)


def test_bad_sizes(pair):
    hq, made, _ = pair
    with pytest.raises(ValueError, match="different size"):
        psnr(hq, made[1:])
    with pytest.raises(ValueError, match="11x11"):
        ssim(hq[:8, :8], made[:8, :8])
    with pytest.raises(ValueError, match="leaves nothing"):
        psnr(hq[:8, :8], made[:8, :8], border=4)


def test_what_is_missing_is_named_with_the_cure(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    scorer = Scorer(weights=tmp_path)
    assert scorer.status["psnr"] == scorer.status["ssim"] == "ok"
    assert scorer.status["lpips"] == scorer.status["dists"] == f"skipped: run `teasr weights --folder {tmp_path}`"
    allowed = r"ok|skipped: (put|run (`teasr weights|pip install 'teasr\[metrics\]'))"
    assert all(re.match(allowed, status) for status in scorer.status.values())
    assert scorer.picture_names == ["psnr", "ssim", "checkerboard", "seam", "detail", "energy", "patches"]
    monkeypatch.setenv("TEASR_METRIC_WEIGHTS", str(tmp_path))
    assert Scorer(["lpips"]).status["lpips"] == "skipped: run `teasr weights`"
    (tmp_path / "alexnet-owt-7be5be79.pth").write_bytes(b"another")
    status = Scorer(["lpips"], weights=tmp_path).status["lpips"]
    assert "is not the published file (sha256" in status and "not 7be5be79" in status
    with pytest.raises(ValueError, match=r"lpips: .* is not the published file"):
        Scorer(["psnr", "lpips"], weights=tmp_path, require=True)
    with pytest.raises(ValueError, match="metric psnr_y does not exist: choose from psnr, ssim"):
        Scorer(["psnr_y"])
    with pytest.raises(ValueError, match="protocol other does not exist: choose from osediff, crop4, rgb"):
        Scorer(protocol="other")


def test_a_printed_grid_is_seen(pair):
    """A grid of 8 px with a deviation of one grey level in a natural image, against the image without it.

    No reference image is needed.
    """
    hq, _, _ = pair
    grid = hq.astype(int)
    grid[::8] += 8
    scorer = Scorer(["checkerboard"])
    clean, printed = (scorer.picture(x.clip(0, 255).astype(np.uint8), None)["checkerboard"] for x in (hq, grid))
    assert printed > 2 * clean and scorer.identity["checkerboard"]["better"] == "lower"


def test_identity_tells_protocol_direction_and_hashes(tmp_path):
    (tmp_path / "alexnet-owt-7be5be79.pth").write_bytes(b"another")
    told = Scorer(["psnr", "lpips"], "crop4", tmp_path).identity
    assert told["psnr"]["protocol"] == "crop4: Y of BT.601 ycbcr (limited range), 4 px of border cropped"
    assert told["psnr"]["better"] == "higher" and told["lpips"]["better"] == "lower"
    assert told["lpips"]["code"].startswith("lpips ")


def test_lpips_runs_on_the_file_that_was_given(tmp_path, monkeypatch, pair):
    """Random weights under the published file name, with the expected hash set to theirs.

    The file is found in the given folder and nothing is downloaded.
    """
    import torch
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), tmp_path / "alexnet-owt-7be5be79.pth")
    file = File("alexnet-features.safetensors", instead=File("alexnet-owt-7be5be79.pth"))
    monkeypatch.setitem(METRICS, "lpips", Metric("lpips", "LPIPS", False, "full", "lpips", (file,)))
    scorer, (hq, made, _) = Scorer(["lpips"], weights=tmp_path), pair
    assert 0 < scorer.picture(made, hq)["lpips"] < 2 and scorer.picture(hq, hq)["lpips"] == 0
    assert scorer.picture(made, None) == {}


def test_metrics_of_pyiqa_load_from_the_folder(tmp_path, monkeypatch, pair):
    """Inception with random weights under its published file name, and the FID of a set with itself.

    Runs only where the extra is installed.
    """
    pytest.importorskip("pyiqa", reason="the `metrics` extra is not installed (PolyForm Noncommercial)")
    import torch
    from pyiqa.archs.inception import fid_inception_v3

    hq, made, _ = pair
    fid = Metric("fid", "FID", False, "set", "pyiqa", (File("pt_inception-2015-12-05-6726825d.pth"),))
    with monkeypatch.context() as patch:
        patch.setattr("pyiqa.archs.inception.load_pretrained_network", lambda *_: None)
        torch.manual_seed(0)
        torch_model = fid_inception_v3()
    torch.save(torch_model.state_dict(), tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    monkeypatch.setitem(METRICS, "fid", fid)
    scorer = Scorer(["fid"], weights=tmp_path)
    for shift in range(4):
        scorer.add_to_set("hq", np.roll(hq, 20 * shift, 0))
        scorer.add_to_set("made", np.roll(made, 20 * shift, 0))
    same, other = (scorer.sets(name, "hq")["fid"] for name in ("hq", "made"))
    assert abs(same) < 1e-6 and other > 10 * abs(same)


def test_patch_distance_compares_textures_not_places(pair):
    """Moving a texture changes nothing; losing it costs almost 1; noise of the same energy is not the texture."""
    hq = pair[0]
    patches = Scorer(["patches"])
    noise = np.random.default_rng(0).normal(size=hq.shape[:2])[..., None] * [1, 1, 1]
    blurred = cv2.GaussianBlur(hq, (0, 0), 4)
    noisy = (blurred + 12 * noise).clip(0, 255).astype(np.uint8)
    found = {name: patches.picture(x, hq)["patches"] for name, x in (("blurred", blurred), ("noisy", noisy))}
    assert patches.picture(hq, hq)["patches"] == 0 and patches.picture(hq[::-1, ::-1], hq)["patches"] < 0.15
    assert found["blurred"] > 0.7 and 0.2 < found["noisy"] < found["blurred"]
    with pytest.raises(ValueError, match="at least 7 px"):
        patches.picture(hq[:6, :6], hq[:6, :6])


def test_metrics_with_a_target_are_best_closest_to_it(pair):
    """Both sides of the target count: 0.9 is better than 1.2, and 1.05 is better than both."""
    hq, made, _ = pair
    for name, label in (("seam", "Seam"), ("detail", "Flat/busy"), ("energy", "Detail")):
        metric = METRICS[name]
        assert metric.label == label and metric.target == 1 and metric.arrow == "→ 1"
        assert max((1.2, 0.9, 1.05, 0.7), key=metric.merit) == 1.05 and metric.merit(0.9) > metric.merit(1.2)
    assert max((1.0, 2.0), key=METRICS["psnr"].merit) == 2 and max((1.0, 2.0), key=METRICS["lpips"].merit) == 1
    blurred = cv2.GaussianBlur(hq, (0, 0), 2)
    energy = Scorer(["energy"])
    assert energy.picture(hq, hq)["energy"] == 1 and energy.picture(blurred, hq)["energy"] < 0.9
    scorer = Scorer(["seam", "detail"])
    assert scorer.identity["seam"]["better"] == "closer to 1"
    assert scorer.picture(hq, hq)["detail"] == 1 and scorer.picture(made, hq)["detail"] > 1
    assert list(scorer.picture(made, None)) == ["seam"]


def test_dists_runs_on_the_files_that_were_given(tmp_path, monkeypatch, pair):
    """Random weights in the files that `teasr weights` writes, with the expected hashes left out; pyiqa is not used."""
    import torch
    import torchvision
    from safetensors.torch import save_file

    torch.manual_seed(0)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], batch_norm=False)
    save_file({f"features.{n}": x for n, x in layers.state_dict().items()}, tmp_path / "vgg16-features.safetensors")
    terms = {name: torch.ones(1, 1475, 1, 1) for name in ("alpha", "beta")}
    save_file(terms, tmp_path / "dists_alpha_beta.safetensors")
    files = File("vgg16-features.safetensors"), File("dists_alpha_beta.safetensors")
    monkeypatch.setitem(METRICS, "dists", Metric("dists", "DISTS", False, "full", None, files))
    scorer, (hq, made, _) = Scorer(["dists"], weights=tmp_path), pair
    hq, made = hq[:64, :64], made[:64, :64]
    assert 0 < scorer.picture(made, hq)["dists"] < 1 and scorer.picture(hq, hq)["dists"] == pytest.approx(0, abs=1e-5)
    assert scorer.identity["dists"]["code"] == "teasr"
