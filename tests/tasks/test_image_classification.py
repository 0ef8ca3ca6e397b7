"""Vision: a model's own processor is the oracle for pixels; what is no plain picture is read or refused by its row."""

import io
import json

import datasets
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextConfig,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    SwinConfig,
    ViTConfig,
)

import fedlora
from fedlora.export.peft import export_model
from fedlora.runs.config import build
from fedlora.runs.folder import RunFolder
from fedlora.schema import ConfigError
from fedlora.tasks.data import images as pictures
from fedlora.tasks.data.image_transforms import ImageTransform
from fedlora.tasks.image_classification import ImageClassification, crop, flip
from tests.fixtures.federation import config as digits
from tests.fixtures.federation import same

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
KINDS = {
    "vit": ViTConfig(**SMALL, image_size=28, patch_size=14),
    "deit": DeiTConfig(**SMALL, image_size=28, patch_size=14),
    "swin": SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2),
    "convnext": ConvNextConfig(image_size=28, depths=[1, 1], hidden_sizes=[8, 16], num_stages=2),
}
DEITS = {"deit": DeiTForImageClassification, "distilled": DeiTForImageClassificationWithTeacher}
VIT = {"image_processor_type": "ViTImageProcessor", "size": {"height": 28, "width": 28}}
PROCESSORS = {
    "plain bilinear": ("vit", {**VIT, "resample": 2, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}),
    "bicubic": ("vit", {**VIT, "resample": 3}),
    "nearest": ("vit", {**VIT, "resample": 0}),
    "not normalised": ("vit", {**VIT, "do_normalize": False}),
    "rescaled to 2": ("vit", {**VIT, "rescale_factor": 1 / 127.5}),
    "not rescaled": ("vit", {**VIT, "do_rescale": False, "do_normalize": False}),
    "DeiT's crop": (
        "deit",
        {
            "image_processor_type": "DeiTImageProcessor",
            "size": {"height": 32, "width": 32},
            "crop_size": {"height": 28, "width": 28},
            "resample": 3,
        },
    ),
    "shortest edge and crop": (
        "deit",
        {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 28, "width": 28},
            "resample": 3,
        },
    ),
    "ConvNeXt's own": ("convnext", {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 28}}),
    "ConvNeXt's large": (
        "convnext",
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}},
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of small models with random weights, made once a kind."""
    made = {}

    def folder(kind, processor=None):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            torch.manual_seed(0)
            make = DEITS.get(kind, AutoModelForImageClassification.from_config)
            make(KINDS.get(kind, KINDS["deit"])).save_pretrained(made[kind])
        file = made[kind] / "preprocessor_config.json"
        file.write_text(json.dumps(processor)) if processor else file.unlink(missing_ok=True)
        return str(made[kind])

    return folder


def photographs():
    china, flower = (load_sample_image(f"{name}.jpg") for name in ("china", "flower"))
    return {
        "landscape": china.copy(),
        "portrait": flower.transpose(1, 0, 2)[:300, 50:250].copy(),
        "smaller": china[100:117, 200:221].copy(),
        "its own size": flower[:28, :28].copy(),
    }


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_the_processors_own(name, models):
    kind, settings_ = PROCESSORS[name]
    folder = models(kind, settings_)
    form, processor = ImageTransform.of(folder), AutoImageProcessor.from_pretrained(folder, backend="pil")
    task = ImageClassification("none")
    for what, array in photographs().items():
        wanted = processor(Image.fromarray(array), return_tensors="pt")["pixel_values"][0]
        form.check(torch.from_numpy(array))
        pixels = form.fit([torch.from_numpy(array)])
        assert pixels.dtype == torch.uint8
        rows = type("Rows", (), {"features": {"pixels": pixels, **form.constants()}, "labels": torch.zeros(1)})
        ours = task.collate(rows, torch.tensor([0]))["pixel_values"][0]
        step = 1 / 255 if form.plain else 0.0  # torch's bilinear filter rounds once, PIL's twice
        away = float(((ours - wanted) * form.std).abs().max() / (255 / form.scale))
        assert away <= step + 1e-6, what


def test_a_processor_that_does_more_is_refused(models, monkeypatch):
    form = ImageTransform.of(models("vit", VIT))
    inner = type(form.processor).normalize
    monkeypatch.setattr(
        type(form.processor), "normalize", lambda self, image, mean, std, **k: 1 - inner(self, image, mean, std, **k)
    )
    with pytest.raises(ValueError, match=r"ViTImageProcessorPil, does more than resize"):
        form.check(torch.from_numpy(photographs()["smaller"]))


def test_images_of_unequal_size_are_refused(models):
    form = ImageTransform.of(models("vit", {**VIT, "size": {"shortest_edge": 28}}))
    found = photographs()
    with pytest.raises(ValueError, match="makes images of unequal size"):
        form.fit([torch.from_numpy(found[name]) for name in ("landscape", "portrait")])


def test_without_a_processor_half_and_half(models):
    form = ImageTransform.of(models("vit"))
    assert form.processor is None and form.size == (28, 28) and form.mean.unique().tolist() == [0.5]


# ------------------------------------------------------------------------------------ what pictures may be


def encoded(image, kind="PNG", **more):
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def parquet(folder, values, **more):
    rows = {"image": values, "label": [i % 2 for i in range(len(values))], **more}
    path = folder / "rows.parquet"
    datasets.Dataset.from_dict(rows).to_parquet(str(path))
    return str(path)


def read(values):
    return next(pictures.read_images(datasets.Dataset.from_dict({"image": values}), "image", None, "training"))


COLOURS = Image.fromarray(load_sample_image("china.jpg")[:20, :30].copy())
MODES = {
    "L": "PNG", "RGB": "PNG", "1": "PNG", "LA": "PNG", "RGBA": "PNG", "P": "PNG", "CMYK": "JPEG", "YCbCr": "JPEG",
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_other_modes_are_as_pil_has_them(mode):
    image = COLOURS.convert(mode)
    stored = encoded(image, MODES[mode])
    wanted = numpy.asarray(Image.open(io.BytesIO(stored)).convert("L" if mode in ("1", "L", "LA") else "RGB"))
    found = read([stored])[0]
    assert torch.equal(found, torch.from_numpy(wanted.copy()).reshape(20, 30, -1))
    assert found.shape[2] == (1 if mode in ("1", "L", "LA") else 3)


def test_a_palette_with_transparency_is_read_without_a_warning():
    stored = encoded(COLOURS.convert("P"), transparency=bytes(range(256)))
    assert read([stored])[0].shape == (20, 30, 3)


def test_a_photograph_stands_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    found = read([encoded(COLOURS, "JPEG", exif=exif, quality=95)])[0]
    assert found.shape == (30, 20, 3)


def test_grey_becomes_colour_and_colour_grey(models):
    form = ImageTransform.of(models("vit", VIT))
    grey = form.fit(read([encoded(COLOURS.convert("L"))]))
    assert grey.shape == (1, 3, 28, 28) and torch.equal(grey[0, 0], grey[0, 2])
    assert ImageTransform.of("demo-vit").fit(read([encoded(COLOURS)])).shape == (1, 1, 8, 8)


def test_arrays_and_floats(models):
    whole = numpy.asarray(COLOURS)
    for values in (whole.tolist(), (whole / 255).tolist(), numpy.dstack([whole, whole[..., :1]]).tolist()):
        assert torch.equal(read([values])[0], torch.from_numpy(whole.copy()))


deep = Image.fromarray(numpy.arange(600, dtype="uint16").reshape(20, 30) * 100)
frames = [COLOURS, COLOURS.rotate(90)]
BAD = {
    "16 bits": (encoded(deep), r"row 1 has an image of mode 'I;16'; 8-bit grey or colour"),
    "floats": (encoded(COLOURS.convert("F"), "TIFF"), r"row 1 has an image of mode 'F'"),
    "animated": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), r"row 1 has an image of 2 frames"),
    "pages": (encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]), r"row 1 has an image of 2 frames"),
    "cut off": (encoded(COLOURS, "JPEG")[:-200], r"row 1 holds a broken picture"),
    "cut off png": (encoded(COLOURS)[:400], r"row 1 holds a broken picture"),
    "no picture": (b"hello", r"row 1 holds bytes of no known picture format"),
}


@pytest.mark.parametrize("value,sentence", BAD.values(), ids=BAD)
def test_pictures_that_are_refused_name_their_row(value, sentence, tmp_path):
    fine = encoded(COLOURS)
    path = parquet(tmp_path, [fine, value, fine, fine])
    with pytest.raises(ValueError, match=f"column 'image', training {sentence}") as caught:
        ImageClassification(path, train_split="all", test_split="all").load("demo-vit", 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value,sentence",
    [
        ("text", "which is no image; name an image column"),
        ([[0, 4095], [1, 2]], "pixels from 0 to 4095"),
        ([[-1.0, 0.5], [0.0, 1.0]], "pixels from -1.0"),
        (numpy.zeros((3, 8, 9)).tolist(), r"an array of shape \(3, 8, 9\)"),
        (None, "row 0 has no picture"),
    ],
)
def test_what_is_no_image(value, sentence):
    with pytest.raises(ValueError, match=sentence):
        read([value])


@pytest.mark.parametrize("shape", [[8, 8], [8, 8, 5], [0, 8, 1]])
def test_a_shape_that_is_none(shape):
    with pytest.raises(ConfigError, match=r"task.image_shape is .*height, width and 1 to 4 channels"):
        build({"model": {"name": "x"}, "task": {"name": "image-classification", "data": "x", "image_shape": shape}})


# ------------------------------------------------------------------------------------ where pictures lie


def saved(folder, splits, per=3):
    """Dark and light pictures, all with content: of one colour they would be the same everywhere, and where all tokens
    are equal, attention has no gradient."""
    draws = numpy.random.default_rng(0)
    for split in splits:
        for label, least in (("dark", 0), ("light", 200)):
            (folder / split / label).mkdir(parents=True)
            for i in range(per):
                pixels = draws.integers(least, least + 40, (17, 11, 3), dtype=numpy.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{i}.png")
    return str(folder)


@pytest.mark.parametrize("splits", [("train",), ("",)], ids=["train only", "no split at all"])
def test_a_folder_without_test_pictures_is_cut_by_the_seed(tmp_path, splits):
    found = ImageClassification(saved(tmp_path, splits, per=10)).load("demo-vit", 0)
    assert (len(found.train), len(found.test)) == (16, 4)
    assert found.label_names == ("dark", "light")
    assert found.train.features["pixels"][found.train.labels == 0].max() < 40


@pytest.mark.parametrize("labels", [["only"], []])
def test_pictures_without_labels_are_said(tmp_path, labels):
    for split in ("train", "test"):
        place = tmp_path.joinpath(split, *labels)
        place.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(place / "a.png")
    with pytest.raises(ValueError, match="have no labels; put them into a folder for each of two labels or more"):
        ImageClassification(str(tmp_path)).load("demo-vit", 0)


def test_a_broken_file_in_a_folder_is_named(tmp_path):
    folder = saved(tmp_path, ("train", "test"))
    (tmp_path / "train" / "dark" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    with pytest.raises(ValueError, match=r"training row \d \(.*dark/1.png\) holds"):
        ImageClassification(folder).load("demo-vit", 0)


def test_parquet_that_knows_its_pictures(tmp_path):
    features = datasets.Features(img=datasets.Image(), fine_label=datasets.ClassLabel(names=["a", "b"]))
    rows = {"img": [{"bytes": encoded(COLOURS), "path": None}] * 8, "fine_label": [0, 1] * 4}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"{split}.parquet"))
    found = ImageClassification(str(tmp_path)).load("demo-vit", 0)
    assert found.train.features["pixels"].shape == (8, 1, 8, 8)
    assert found.label_names == ("a", "b"), "CIFAR-100's own names of columns"


def test_a_copy_of_a_hubs_repository(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        rows = {"image": [{"bytes": encoded(COLOURS), "path": None}] * 6, "label": [0, 1] * 3}
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
        file = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(file))
    assert len(ImageClassification(str(tmp_path)).load("demo-vit", 0).train) == 6


def test_columns_that_are_not_usual_are_said(tmp_path):
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"scan": [encoded(COLOURS)] * 9, "finding": [0, 1, 0] * 3}).to_parquet(str(path))
    with pytest.raises(ValueError, match=r"no column image, img.* among scan, finding; set task.image to one"):
        ImageClassification(str(path)).load("demo-vit", 0)
    with pytest.raises(ValueError, match=r"among scan, finding; set task.label to one"):
        ImageClassification(str(path), image="scan").load("demo-vit", 0)
    assert ImageClassification(str(path), image="scan", label="finding").load("demo-vit", 0).label_names == ("0", "1")


def test_no_more_pictures_are_unpacked_than_a_stretch(monkeypatch):
    monkeypatch.setattr(pictures, "BATCH", 4)
    rows = datasets.Dataset.from_dict({"image": [encoded(COLOURS)] * 10})
    assert [len(some) for some in pictures.read_images(rows, "image", None, "training")] == [4, 4, 2]


def test_the_rows_stay_in_order_over_stretches(monkeypatch, tmp_path):
    monkeypatch.setattr(pictures, "BATCH", 4)
    grey = [encoded(Image.new("L", (8, 8), i * 9)) for i in range(20)]
    path = parquet(tmp_path, grey, row=list(range(20)))
    found = ImageClassification(path).load("demo-vit", 0)
    for examples in (found.train, found.test):
        values = examples.features["pixels"][:, 0, 0, 0].tolist()
        assert [value // 9 % 2 for value in values] == examples.labels.tolist()
    assert found.train.features["pixels"].dtype == torch.uint8
    together = torch.cat([e.features["pixels"][:, 0, 0, 0] for e in (found.train, found.test)])
    assert sorted(together.tolist()) == [i * 9 for i in range(20)]


# ------------------------------------------------------------------------------------ families of networks


def test_a_model_of_another_kind_is_one_sentence(tmp_path):
    """transformers would list all the kinds that it has a network of images for."""
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is of the kind 'bert', which AutoModelForImageClassification does not load"):
        ImageClassification("digits").network(str(tmp_path), 10, 0)


def federation_of(model, folder, **more):
    return build(
        {
            "rounds": 1,
            "model": {"name": model},
            "task": {"name": "image-classification", "data": folder},
            "clients": {"count": 2},
            "adapter": {"name": "lora", "rank": 2},
            "training": {"local_steps": 2, "batch_size": 4, "learning_rate": 5e-3, "precision": "float32"},
            **more,
        }
    )


HEADS = {"distilled": {"cls_classifier", "distillation_classifier"}}


def gradients(federation, kind):
    """Of four training rows at the start, in numbers of this kind."""
    model, task = federation.model, federation.task
    model.load(model.initial(0))
    model.network.to(kind)
    rows = task.collate(federation.data.train, torch.arange(4))
    rows["pixel_values"] = rows["pixel_values"].to(kind)
    return model.gradient(lambda network: task.loss(network, rows))


@pytest.mark.parametrize("kind", [*KINDS, "distilled"])
def test_every_family_trains_its_adapters_and_all_of_its_head(kind, models, tmp_path):
    model = models(kind)
    config = federation_of(model, saved(tmp_path / "d", ("train", "test"), per=8))
    federation = config.federation()
    before = federation.model.initial(0)
    single, double = (gradients(federation, kind) for kind in (torch.float32, torch.float64))
    for part in double:
        found, exact = (max(tree[part].values(), key=lambda x: float(x.norm())) for tree in (single, double))
        assert float((found - exact).norm()) < 1e-3 * float(exact.norm()), f"{part} has a gradient, not only rounding"
    result = fedlora.run(config, tmp_path / "run")
    heads = HEADS.get(kind, {"classifier"})
    assert {part for part in result.shared if "classifier" in part} == heads
    for part, layer in result.shared.items():
        assert "pooler" not in part, "nothing is trained that has no influence"
        assert any(not torch.equal(x, before[part][leaf]) for leaf, x in layer.items()), part
    assert len(result.shared) > len(heads)
    assert export_model(RunFolder.open(tmp_path / "run"), tmp_path / "out", merged=True)["difference"] < 1e-4
    assert AutoConfig.from_pretrained(tmp_path / "out").id2label == {0: "dark", 1: "light"}


def test_an_export_brings_the_processor_along(models, tmp_path):
    model = models("vit", PROCESSORS["bicubic"][1])
    fedlora.run(federation_of(model, saved(tmp_path / "d", ("train", "test"), per=4)), tmp_path / "run")
    export_model(RunFolder.open(tmp_path / "run"), tmp_path / "out", merged=True)
    assert AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil").resample == 3


# ------------------------------------------------------------------------------------ augmentation

FLIP = ["task.augment=['flip', 'crop']", "method.name=fedit"]
pixel_stacks = st.integers(0, 2**31 - 1).map(
    lambda seed: torch.randint(256, (6, 3, 17, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
)


def drawn(seed):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=20, deadline=None)
@given(pixel_stacks, st.integers(0, 1000))
def test_a_flip_mirrors_or_leaves_alone(pixels, seed):
    found = flip(pixels, drawn(seed))
    for one, other in zip(pixels, found):
        mirrored = one.numpy()[:, :, ::-1]
        assert numpy.array_equal(other.numpy(), one.numpy()) or numpy.array_equal(other.numpy(), mirrored)
    assert torch.equal(found, flip(pixels, drawn(seed)))


@settings(max_examples=20, deadline=None)
@given(pixel_stacks, st.integers(0, 1000))
def test_a_crop_is_a_shift_on_black(pixels, seed):
    found = crop(pixels, drawn(seed))
    assert found.dtype == torch.uint8 and found.shape == pixels.shape
    framed = numpy.pad(pixels.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    for whole, cut in zip(framed, found.numpy()):
        windows = [whole[:, y : y + 17, x : x + 16] for y in range(5) for x in range(5)]
        assert any(numpy.array_equal(cut, window) for window in windows)


def test_both_happen_about_as_often_as_they_should():
    pixels = torch.arange(16, dtype=torch.uint8).repeat(2000, 1, 16, 1)
    assert 0.45 < float((flip(pixels, drawn(0))[:, 0, 0, 0] == 15).float().mean()) < 0.55
    shifts = crop(pixels, drawn(0))[:, 0, 8, 8].bincount(minlength=11)[6:11]
    assert int(shifts.min()) > 300 and int(shifts.sum()) == 2000, "each of five places"


def test_steps_of_training_differ_and_evaluation_is_as_it_was():
    plain, varied = digits("method.name=fedit"), digits(*FLIP)
    task, data = varied.task, varied.task.load("demo-vit", 0)
    rows = torch.arange(8)
    clean = plain.task.collate(data.train, rows)["pixel_values"]
    assert torch.equal(task.collate(data.train, rows)["pixel_values"], clean)
    assert torch.equal(plain.task.collate_for_training(data.train, rows, drawn(0))["pixel_values"], clean), "as before"
    draws = drawn(0)
    first, second = (task.collate_for_training(data.train, rows, draws)["pixel_values"] for _ in range(2))
    assert not torch.equal(first, second) and not torch.equal(first, clean)
    assert not same(fedlora.run(plain).shared, fedlora.run(varied).shared)


VARIED = [
    ("fedit", "task.augment=['flip', 'crop']"),
    ("fedsa-lora", "task.augment=['crop']"),
    ("fedit", "task.metric=macro_f1"),
]


@pytest.mark.parametrize("method,setting", VARIED)
def test_augmented_runs_and_figures_by_label_have_the_same_bits_on_flowers_grid(method, setting, tmp_path):
    pytest.importorskip("flwr", reason="needs the flower extra")
    from tests.fixtures.flower import World

    settings_ = [setting, f"method.name={method}"]
    here, there = fedlora.run(digits(*settings_)), World(tmp_path, *settings_).run()
    assert same(there[-1].shared, here.shared)
    assert [r.record["clients"] for r in there] == [r["clients"] for r in here.records]


def test_an_augmentation_that_is_none():
    with pytest.raises(ConfigError, match=r"task.augment is .*'flip' or 'crop'"):
        digits("task.augment=['turn']")
