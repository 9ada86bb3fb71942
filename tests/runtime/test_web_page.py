"""The page of `upright web` in a headless Chromium, with the real onnxruntime-web.

These tests need `pip install playwright`, a Chromium (`apt-get install chromium`), and onnxruntime-web in the checkout
(`npm install --no-save onnxruntime-web@1.30.0`). They are skipped without these.
"""

import base64
import functools
import http.server
import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, Upright
from tests.runtime.bundles import photograph, write_bundle, write_multilabel_bundle, write_orientation_bundle
from upright.architectures.lenet import LeNet
from upright.architectures.nin import NiN
from upright.architectures.transformer_network import TransformerNetwork
from upright.exporting.graph import Form
from upright.images import ImageSpec, Resize
from upright.runtime.predictor import MultiLabelPredictor, OrientationPredictor, Predictor, open_session, run_batch
from upright.runtime.web import RUNTIME_VERSION

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RUNTIME = ROOT / "node_modules/onnxruntime-web"
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
    pytest.mark.skipif(
        not RUNTIME.is_dir(), reason=f"no runtime: npm install --no-save onnxruntime-web@{RUNTIME_VERSION}"
    ),
]
# A container runs Chromium as root, which needs --no-sandbox. The other flags stop the browser's own requests.
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]

STN = functools.partial(TransformerNetwork, network=LeNet)
GREY = ImageSpec(1, 28, 28, tuple("0123456789"), (0.4,), (0.5,))
CLASSES = tuple(f"class {k:04d}" for k in range(1000))
COLOUR = ImageSpec(3, 32, 40, CLASSES, (0.4,) * 3, (0.5,) * 3, background=90, interpolation="bicubic")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def look(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a page from a local server or from a file. At the end, fail if the page logged or requested anything."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    complaints: list[str] = []
    contexts = []
    servers = []

    def opened(page: Path, ready: str = "#status.good", **options: Any) -> Any:
        if page.is_dir():
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=page))
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            servers.append((server, thread))
            address = f"http://127.0.0.1:{server.server_port}/"
        else:
            address = page.absolute().parent.as_uri()
        contexts.append(browser.new_context(**options))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: complaints.append(f"console: {message.text}"))
        tab.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        allowed = (address, "blob:", "data:")
        tab.on("request", lambda request: request.url.startswith(allowed) or complaints.append(request.url))
        tab.goto(address if page.is_dir() else page.absolute().as_uri())
        tab.wait_for_selector(ready)
        return tab

    opened.complaints = complaints
    yield opened
    for context in contexts:
        context.close()
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()
    assert complaints == []


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes the bundle of a network once."""
    return functools.cache(lambda *what: write_bundle(tmp_path_factory.mktemp("bundle") / "made", *what))


@pytest.fixture
def made(upright: Upright, tmp_path: Path, bundle_of: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that writes the bundle `export/made` and its page."""

    def page(spec: ImageSpec, network: Any, form: Form | None = None, *options: str) -> Path:
        shutil.copytree(bundle_of(spec, network, form), tmp_path / "export/made")
        assert upright("web", tmp_path / "export/made", "--runtime", RUNTIME, *options).code == 0
        return tmp_path / "web/made"

    return page


def until(tab: Any, condition: str) -> None:
    """Wait until an expression is true. Playwright's own function needs `eval`, which the page forbids."""
    for _ in range(200):
        if tab.evaluate(condition):
            return
        tab.wait_for_timeout(50)
    raise AssertionError(f"never {condition}; status of the page: {tab.inner_text('#status')}")


SETTLED = "document.getElementById('share').textContent.startsWith('Stays')"


def settled(tab: Any, action: Callable[[], object]) -> np.ndarray:
    """Return the values on the page after ``action``, when the model has finished all tasks."""
    tab.evaluate("document.getElementById('share').textContent = ''")
    action()
    until(tab, SETTLED)
    return rows(tab)


def rows(tab: Any) -> np.ndarray:
    return np.array([float(one.get_attribute("value")) for one in tab.query_selector_all("#rows data")])


def canvas(tab: Any, name: str) -> np.ndarray:
    """Return the pixels of a canvas, ``(H, W, 3)``."""
    address = tab.evaluate("name => document.getElementById(name).toDataURL()", name)
    return np.array(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB"))


def slide(tab: Any, name: str, value: int) -> None:
    tab.locator(name).fill(str(value))


def test_the_page_checks_the_samples_and_names_the_runtime(look: Any, made: Any) -> None:
    tab = look(made(GREY, STN, Form(outputs=("warped",))))
    status = tab.inner_text("#status")
    assert status.startswith("4 of 4 samples match the export (largest difference ") and "1e-4" in status
    assert RUNTIME_VERSION in tab.inner_text("#about") and "no image leaves it" in tab.inner_text("#about")
    assert abs(rows(tab).sum() - 1) < 1e-5 and len(rows(tab)) == 10
    names = [button.get_attribute("aria-label") for button in tab.query_selector_all("#samples button")]
    assert names == [f"Sample {number}, labelled 0" for number in (1, 2, 3, 4)]


def test_other_predictions_are_reported(look: Any, made: Any) -> None:
    page = made(GREY, LeNet)
    facts = json.loads((page / "model.json").read_text())
    facts["samples"][2]["expected"][0] += 0.01
    (page / "model.json").write_text(json.dumps(facts))
    status = look(page, "#status.bad").inner_text("#status")
    assert "1 of 4 samples differ from the export (largest difference 1.0e-2" in status


def image_files(folder: Path) -> Iterator[Path]:
    """Write images of kinds that are easily decoded in another way than in Python."""
    noise = np.random.default_rng(0).integers(0, 256, (31, 45, 4), dtype=np.uint8)
    colour = Image.fromarray(noise[..., :3])
    rotated = Image.Exif()
    rotated[0x0112] = 6
    for name, image, options in (
        ("grey.png", Image.fromarray(noise[..., 0]), {}),
        ("colour.png", colour, {}),
        ("palette.png", colour.quantize(30), {}),
        ("deep.png", Image.fromarray(noise[..., 0].astype(np.uint16) * 250 + 77), {}),
        ("gamma.png", colour, {"pnginfo": gamma()}),
        ("rotated.jpg", colour, {"exif": rotated}),
        ("large.png", colour.resize((1024, 700)), {}),
    ):
        image.save(folder / name, **options)
        yield folder / name


def gamma() -> Any:
    from PIL.PngImagePlugin import PngInfo

    chunk = PngInfo()
    chunk.add(b"gAMA", (100_000).to_bytes(4, "big"))
    return chunk


@pytest.mark.parametrize("spec", [GREY, COLOUR], ids=["grey", "colour"])
def test_images_are_decoded_as_in_python(look: Any, made: Any, tmp_path: Path, spec: ImageSpec) -> None:
    tab = look(made(spec, LeNet))
    predictor = Predictor(tmp_path / "export/made")
    for path in image_files(tmp_path):
        actual = settled(tab, lambda path=path: tab.set_input_files("#file", path))
        expected = (
            np.array([p for _, p in predictor(path).top(5)])
            if spec is COLOUR
            else np.array(list(predictor(path).probabilities.values()))
        )
        pixels = predictor.decode(path)
        assert np.array_equal(canvas(tab, "input"), np.broadcast_to(pixels, (*pixels.shape[:2], 3))), path.name
        assert np.abs(actual - expected).max() < 1e-5, path.name


def test_the_background_of_a_transparent_image(look: Any, made: Any, tmp_path: Path) -> None:
    tab = look(made(COLOUR, LeNet))
    noise = np.random.default_rng(0).integers(0, 256, (31, 45, 4), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "clear.png")
    settled(tab, lambda: tab.set_input_files("#file", tmp_path / "clear.png"))
    pixels = Predictor(tmp_path / "export/made").decode(tmp_path / "clear.png")
    # A canvas stores colours multiplied by alpha, so they are rounded twice.
    assert np.abs(canvas(tab, "input").astype(int) - pixels).max() <= 1


def test_rotation(look: Any, made: Any, tmp_path: Path) -> None:
    tab = look(made(GREY, STN, Form(outputs=("warped",))))
    session = open_session(tmp_path / "export/made/model.onnx")
    square = np.random.default_rng(1).integers(0, 256, (30, 30), dtype=np.uint8)
    Image.fromarray(square).save(tmp_path / "square.png")
    before = settled(tab, lambda: tab.set_input_files("#file", tmp_path / "square.png"))
    for angle, quarters in ((90, -1), (180, 2), (-90, 1), (0, 0)):
        slide(tab, "#angle", angle)
        tab.wait_for_timeout(200)
        pixels = canvas(tab, "input")[..., 0]
        assert np.abs(pixels.astype(int) - np.rot90(square, quarters)).max() <= 1
        expected, warped = run_batch(session, pixels[None, :, :, None], ("probabilities", "warped"))
        assert np.abs(rows(tab) - expected[0]).max() < 1e-5
        assert np.abs(canvas(tab, "warped")[..., 0] - warped[0, ..., 0]).max() <= 1
    assert np.array_equal(rows(tab), before)
    slide(tab, "#angle", 37)
    assert tab.inner_text("#degrees") == "37°" and tab.locator("#angle").get_attribute("aria-valuetext") == "37 degrees"
    tab.focus("#angle")
    tab.keyboard.press("ArrowLeft")
    assert tab.inner_text("#degrees") == "36°"
    slide(tab, "#scale", 50)
    tab.wait_for_timeout(200)
    # The area outside of the image has the mean colour of its border.
    border = np.concatenate([square[0], square[-1], square[:, 0], square[:, -1]])
    assert abs(int(canvas(tab, "input")[0, 0, 0]) - border.mean()) <= 1
    tab.click("#reset")
    tab.wait_for_timeout(200)
    assert np.array_equal(rows(tab), before)


def test_the_curve_matches_the_slider(look: Any, made: Any) -> None:
    tab = look(made(GREY, LeNet))
    until(tab, SETTLED)
    curves = tab.eval_on_selector_all("#curves .curve", "paths => paths.map(path => path.getAttribute('d'))")
    points = [np.array([point.split() for point in curve[1:].split("L")], float) for curve in curves]
    assert all(np.array_equal(curve[:, 0], np.arange(-180, 181, 5)) for curve in points)
    for angle in (-60, 45, 180):
        slide(tab, "#angle", angle)
        tab.wait_for_timeout(150)
        at = {round(1 - curve[(angle + 180) // 5, 1], 3) for curve in points}
        assert all(np.abs(rows(tab) - p).min() < 2e-3 for p in at)


def test_spinning(look: Any, made: Any) -> None:
    tab = look(made(GREY, LeNet))
    tab.click("#spin")
    assert tab.inner_text("#spin") == "Stop"
    until(tab, "parseFloat(document.getElementById('angle').value) > 10")
    tab.click("#spin")
    stopped = tab.input_value("#angle")
    tab.wait_for_timeout(200)
    assert tab.input_value("#angle") == stopped and tab.inner_text("#spin") == "Spin"


def test_reduced_motion_rotates_in_steps(look: Any, made: Any) -> None:
    tab = look(made(GREY, LeNet), reduced_motion="reduce")
    tab.click("#spin")
    angles = set()
    for _ in range(30):
        angles.add(float(tab.input_value("#angle")))
        tab.wait_for_timeout(50)
    assert len(angles) > 1 and all(angle % 15 == 0 for angle in angles)


@pytest.mark.parametrize("angle", [0, 90])
def test_drawing(look: Any, made: Any, angle: int) -> None:
    tab = look(made(GREY, LeNet), viewport={"width": 390, "height": 844}, has_touch=True)
    tab.click("#clear")
    slide(tab, "#angle", angle)
    tab.wait_for_timeout(200)
    before = rows(tab)
    assert canvas(tab, "input").max() == 0 and canvas(tab, "input").shape == (280, 280, 3)
    box = tab.locator("#input").bounding_box()
    at = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])  # noqa: E731
    tab.mouse.move(*at(0.3, 0.25))
    tab.mouse.down()
    tab.mouse.move(*at(0.7, 0.25), steps=4)
    tab.mouse.up()
    tab.mouse.move(*at(0.9, 0.9))
    tab.wait_for_timeout(700)
    # The pen draws below the pointer, also on a rotated image.
    ink = canvas(tab, "input")[..., 0] > 128
    assert ink[70, 90:190].all() and not ink[120:].any()
    assert not np.array_equal(rows(tab), before) and abs(rows(tab).sum() - 1) < 1e-5
    assert tab.inner_text("#spoken").endswith("percent")


def test_pasting_and_dropping(look: Any, made: Any, tmp_path: Path) -> None:
    tab = look(made(GREY, LeNet))
    Image.new("L", (17, 9), 200).save(tmp_path / "grey.png")
    transfer = """([bytes, kind]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], "grey.png", { type: "image/png" }));
        dispatchEvent(kind === "drop" ? new DragEvent("drop", { dataTransfer: transfer, cancelable: true })
                                      : new ClipboardEvent("paste", { clipboardData: transfer }));
    }"""
    for kind in ("drop", "paste"):
        tab.click("#clear")
        tab.evaluate(transfer, [list((tmp_path / "grey.png").read_bytes()), kind])
        until(tab, "document.getElementById('input').width === 17")
        assert (canvas(tab, "input") == 200).all()


def test_bad_images_are_reported_and_the_next_one_is_classified(look: Any, made: Any, tmp_path: Path) -> None:
    spec = ImageSpec(1, 28, 28, ("a", "b"), (0.4,), (0.5,), resize="none")
    tab = look(made(spec, functools.partial(NiN, widths=(8, 8), stem=(5, 1, 2))))
    (tmp_path / "text.png").write_text("not an image")
    tab.set_input_files("#file", tmp_path / "text.png")
    tab.wait_for_selector("#status.bad")
    assert tab.inner_text("#status") == "This browser cannot read “text.png” as an image."
    Image.new("L", (40, 1)).save(tmp_path / "thin.png")
    until(tab, SETTLED)
    tab.set_input_files("#file", tmp_path / "thin.png")
    until(tab, "document.getElementById('state').textContent.startsWith('The model does not accept')")
    assert "40 x 1 pixels" in tab.inner_text("#status")
    # Nothing of the answer for the image before is left.
    assert not tab.is_visible("#rows") and not tab.locator("#curves .curve").count()
    assert not tab.inner_text("#share").strip() and not tab.inner_text("#legend")
    tab.click("#samples button")
    tab.wait_for_selector("#status.good")
    assert tab.is_visible("#rows")
    assert "Non-zero status code" in look.complaints.pop() and not look.complaints  # a message of onnxruntime


def test_a_thousand_classes_and_a_large_image(look: Any, made: Any, tmp_path: Path) -> None:
    tab = look(made(COLOUR, LeNet))
    Image.new("RGB", (3000, 1500), (200, 10, 10)).save(tmp_path / "large.jpg")
    listed = settled(tab, lambda: tab.set_input_files("#file", tmp_path / "large.jpg"))
    assert len(listed) == 5 and (np.diff(listed) <= 0).all()
    # No class reaches the probability of a curve, except the one that the text names.
    legend = tab.locator("#legend span").all_inner_texts()
    assert len(legend) == tab.locator("#curves .curve").count() == 1 and f"Stays “{legend[0]}”" in tab.inner_text(
        "#share"
    )
    assert canvas(tab, "input").shape == (512, 1024, 3) and "1024 x 512 of 3000 x 1500" in tab.inner_text("#remark")


@pytest.mark.parametrize(("resize", "top", "left"), [("stretch", 0, 0), ("crop", 255, 255), ("pad", 99, 0)])
def test_a_model_of_fixed_size_and_batch(
    look: Any, made: Any, tmp_path: Path, resize: Resize, top: int, left: int
) -> None:
    """The image is twice as wide as high, black with a white middle half."""
    spec = ImageSpec(1, 28, 28, ("a", "b"), (0.4,), (0.5,), resize=resize, background=99)
    tab = look(made(spec, LeNet, Form(batch=3, size=(28, 28))))
    halves = np.zeros((60, 120), np.uint8)
    halves[:, 30:90] = 255
    Image.fromarray(halves).save(tmp_path / "wide.png")
    settled(tab, lambda: tab.set_input_files("#file", tmp_path / "wide.png"))
    pixels = canvas(tab, "input")[..., 0]
    assert pixels.shape == (28, 28) and (pixels[9:19, 2] == left).all() and (pixels[2, 2:4] == top).all()
    tab.click("#clear")
    assert canvas(tab, "input").shape == (28, 28, 3)


def test_several_transformers(look: Any, made: Any) -> None:
    network = functools.partial(TransformerNetwork, network=LeNet, places=["input", "features.3"])
    tab = look(made(GREY, network, Form(outputs=("warped",))))
    assert tab.locator("#views figcaption").all_inner_texts() == ["Output of transformer 1", "Output of transformer 2"]
    assert canvas(tab, "warped_2").std() > 0


def test_several_classes(look: Any, upright: Upright, tmp_path: Path) -> None:
    bundle = write_multilabel_bundle(tmp_path / "export/tags")
    assert upright("web", bundle, "--runtime", RUNTIME).code == 0
    tab = look(tmp_path / "web/tags")
    predictor = MultiLabelPredictor(bundle)
    results = [predictor(file) for file in predictor.bundle.sample_files]
    assert {len(result.labels) for result in results} & {0, 2, 3}
    for number, result in enumerate(results):
        tab.click(f"#samples button:nth-child({number + 1})")
        marked = [name for name in predictor.spec.classes if name in result.labels]
        marks = "[...document.querySelectorAll('#rows .first .label')].map(label => label.title).join()"
        until(tab, f"{marks} === '{','.join(marked)}'")
        assert rows(tab) == pytest.approx(list(result.probabilities.values()), abs=1e-5)
    until(tab, f"document.getElementById('share').textContent.includes('“{', '.join(marked) or 'no class'}”')")


def test_the_orientation(look: Any, upright: Upright, tmp_path: Path) -> None:
    bundle = write_orientation_bundle(tmp_path / "export/sky")
    assert upright("web", bundle, "--runtime", RUNTIME).code == 0
    tab = look(tmp_path / "web/sky")
    assert tab.inner_text("#status").startswith("4 of 4 samples match the export (largest difference ")
    names = [button.get_attribute("aria-label") for button in tab.query_selector_all("#samples button")]
    assert names == [f"Sample {number}" for number in (1, 2, 3, 4)] and not tab.is_visible("#clear")
    upper = photograph(0, 60)[..., 0]
    Image.fromarray(upper).save(tmp_path / "upper.png")
    tab.set_input_files("#file", tmp_path / "upper.png")
    predictor = OrientationPredictor(bundle)
    for angle, quarters in ((0, 0), (90, 1), (-90, -1)):
        slide(tab, "#angle", angle)
        pixels = canvas(tab, "input")[..., 0]
        # The slider rotates anticlockwise, as the angle of the model.
        assert np.abs(pixels.astype(int) - np.rot90(upper, quarters)).max() <= 1
        expected = predictor(pixels)
        assert expected.angle == pytest.approx(angle, abs=1)
        text = f"{expected.angle:z.1f}°".replace("-", "\N{MINUS SIGN}")
        until(tab, f"document.getElementById('estimate').textContent === '{text}'")
        assert rows(tab) == pytest.approx([expected.confidence], abs=1e-5)
        inside = np.s_[5:-5, 5:-5, 0]
        assert np.abs(canvas(tab, "straightened")[inside].astype(int) - upper[5:-5, 5:-5]).max() <= 3
        side = "anticlockwise" if expected.angle < 0 else "clockwise"
        assert tab.locator("#views figcaption").inner_text() == (
            f"Straightened: rotated {abs(expected.angle):.1f}° {side}"
        )
    slide(tab, "#angle", 0)
    until(tab, "document.getElementById('share').textContent.startsWith('Deviation: median 0')")
    angles, confidences = tab.eval_on_selector_all(
        "#curves .curve", "paths => paths.map(path => path.getAttribute('d'))"
    )[::-1]
    # The line of the angle has a break where it passes 180 degrees.
    assert confidences.count("M") == 1 and angles.count("M") == 2
    # Other answers than those of the export are reported. Below the threshold, the image is not rotated.
    facts = json.loads((tmp_path / "web/sky/model.json").read_text()) | {"threshold": 0.5}
    facts["samples"][1]["expected"][0] += 2
    (tmp_path / "web/sky/model.json").write_text(json.dumps(facts))
    tab = look(tmp_path / "web/sky", "#status.bad")
    assert "1 of 4 samples differ from the export (largest difference 7.8e-3" in tab.inner_text("#status")
    tab.click("#samples button:nth-child(3)")
    until(tab, "document.getElementById('estimate').textContent.endsWith('90.0°')")
    text = "Straightened: not rotated, because the confidence is below 0.50"
    assert tab.locator("#views figcaption").inner_text() == text
    assert np.array_equal(canvas(tab, "straightened"), canvas(tab, "input"))


def test_from_a_disk(look: Any, made: Any, tmp_path: Path) -> None:
    page = made(GREY, LeNet)
    tab = look(page / "index.html", "#status.bad")
    assert "Serve its folder" in tab.inner_text("#status") and "--one-file" in tab.inner_text("#status")


def test_one_file_from_a_disk(look: Any, made: Any) -> None:
    tab = look(made(GREY, STN, Form(outputs=("warped",)), "--one-file") / "index.html")
    assert tab.inner_text("#status").startswith("4 of 4 samples")


@pytest.mark.parametrize("missing", ["model.onnx", "runtime/ort-wasm-simd-threaded.wasm", "model.json"])
def test_the_page_names_a_missing_file(look: Any, made: Any, missing: str) -> None:
    page = made(GREY, LeNet)
    (page / missing).unlink()
    tab = look(page, "#status.bad")
    assert tab.inner_text("#status") == f"The model cannot be loaded: {missing} is missing (HTTP 404)."
    assert tab.locator("#progress").is_hidden()
    assert "404" in look.complaints.pop() and not look.complaints


def test_the_page_fits_every_width(look: Any, made: Any) -> None:
    tab = look(made(GREY, STN, Form(outputs=("warped",))))
    for width in (320, 390, 768, 1280):
        tab.set_viewport_size({"width": width, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_nothing_moves_while_it_loads(look: Any, made: Any) -> None:
    page = made(GREY, STN, Form(outputs=("warped",)))
    sections = "['image', 'prediction', 'rotation', 'gallery']"
    tops = f"{sections}.map(id => document.getElementById(id).getBoundingClientRect().top)"
    for width in (390, 1280):
        tab = look(page, "#samples button:nth-child(4)", viewport={"width": width, "height": 800})
        early = tab.evaluate(tops)
        tab.wait_for_selector("#status.good")
        until(tab, SETTLED)
        assert tab.evaluate(tops) == early
