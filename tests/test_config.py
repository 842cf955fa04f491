"""Recipes: every shipped variant loads, values keep their types, mistakes are named before anything is allocated."""

import dataclasses
import json

import pytest

from av_mae import recipes
from av_mae.config import DataConfig, MeshConfig, OptimizerConfig, SoundConfig, TrainConfig
from av_mae.errors import UserError
from av_mae.models.config import AVMAEConfig, StreamConfig

DEMO = "configs/demo.py"


def _load(*overrides, spec=DEMO):
    overrides = ("steps=1600", "batch_size=64", *overrides)
    return recipes.load_recipe(spec, [f"--config.{override}" for override in overrides])


def test_vggsound_is_the_published_recipe():
    config = recipes.load_recipe("configs/pretrain.py:vggsound")
    assert (config.epochs, config.steps, config.optimizer.warmup) == (200.0, 0, 40.0)
    assert (config.batch_size, config.optimizer.base_lr, config.optimizer.weight_decay) == (512, 1.5e-4, 0.05)
    assert (config.model.fusion.attention_ratio, config.model.fusion.mlp_ratio) == (0.25, 1.0)
    assert (config.model.image.mask_ratio, config.model.audio.mask_ratio) == (0.75, 0.80)
    assert recipes.load_recipe("configs/pretrain.py") == config


def test_audioset_is_the_published_recipe():
    config = recipes.load_recipe("configs/pretrain.py:audioset")
    assert (config.model.fusion.attention_ratio, config.model.fusion.mlp_ratio) == (1.0, 4.0)
    assert config.batch_size == 2048
    assert (config.model.image.width, config.model.image.depth) == (768, 12)


@pytest.mark.parametrize(
    "variant, sets, hidden, weight",
    [
        ("", 2, (0.55, 0.90), 3),
        (":demo", 2, (0.55, 0.90), 3),
        (":band", 3, (0.75, 0.80), 1),
        (":digits", 3, (0.75, 0.75), 1),
    ],
)
def test_encoders_of_the_demo_sets(variant, sets, hidden, weight):
    config = recipes.load_recipe(f"{DEMO}{variant}")
    assert len(config.data.path.split(",")) == len(config.data.weights) == sets
    assert (config.model.image.mask_ratio, config.model.audio.mask_ratio) == hidden
    assert (config.model.image.loss_weight, config.model.audio.loss_weight) == (1, weight)


@pytest.mark.parametrize(
    "variant,width,depth,kind",
    [
        ("tiny", 128, 4, "factorized"),
        ("small_dense", 384, 12, "dense"),
        ("base_token", 768, 12, "token"),
        ("large_none", 1024, 24, "none"),
        ("huge_bilinear", 1280, 32, "bilinear"),
    ],
)
def test_size_variants(variant, width, depth, kind):
    model = recipes.load_recipe(f"configs/pretrain.py:{variant}").model
    assert (model.image.width, model.audio.depth, model.fusion.kind) == (width, depth, kind)


def test_every_variant_loads(root):
    from av_mae.config import size_variants

    assert len(size_variants()) == 5 + 25
    for variant in size_variants():
        assert recipes.load_recipe(f"configs/pretrain.py:{variant}").epochs == 200


def test_recipe_is_locked():
    recipe = recipes.as_recipe(TrainConfig(steps=1))
    with pytest.raises(AttributeError, match="steps"):
        recipe.stepz = 3


@pytest.mark.parametrize(
    "override,read,value",
    [
        ("steps=1e3", lambda c: c.steps, 1000),
        ("optimizer.base_lr=1", lambda c: c.optimizer.base_lr, 1.0),
        ("data.weights=None", lambda c: c.data.weights, None),
        ("data.weights=(3, 1)", lambda c: c.data.weights, (3.0, 1.0)),
        ("data.weights=3,1", lambda c: c.data.weights, (3.0, 1.0)),
        ("data.crop_scale=[0.2,1]", lambda c: c.data.crop_scale, (0.2, 1.0)),
        ("data.flip=false", lambda c: c.data.flip, False),
        ("data.jitter=True", lambda c: c.data.jitter, True),
        ("data.path=1,2", lambda c: c.data.path, "1,2"),
        ("model.image.patch=8", lambda c: c.model.image.patch, 8),
        ("model.image.patch=(8,16)", lambda c: c.model.image.patch, (8, 16)),
        ("model.fusion.layers=all", lambda c: c.model.fusion.layers, "all"),
        ("model.fusion.layers=(0,2)", lambda c: c.model.fusion.layers, (0, 2)),
        ("model.fusion.layers=2", lambda c: c.model.fusion.layers, (2,)),
        ("model.fusion.width=128", lambda c: c.model.fusion.width, 128),
        ("model.fusion.tokens=[4,2,2]", lambda c: c.model.fusion.tokens, (4, 2, 2)),
        ("mesh.fsdp=2", lambda c: c.mesh.fsdp, 2),
    ],
)
def test_override(override, read, value):
    got = read(_load(override))
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "override,message",
    [
        ("batchsize=8", "unknown config key 'batchsize'; did you mean 'batch_size'?"),
        ("model.image.maskratio=0.5", "did you mean 'model.image.mask_ratio'?"),
        ("optimizer.bas_lr=1", "did you mean 'optimizer.base_lr'?"),
        ("mask_ratio=0.5", "mask_ratio'?"),
        ("data.sound=3", "'data.sound' is a group of keys: set one of data.sound.rate"),
        ("steps=many", "config key 'steps' must be a whole number, got 'many'"),
        ("steps=1.5", "config key 'steps' must be a whole number, got 1.5"),
        ("steps=True", "must be a whole number, got True"),
        ("data.flip=3", "config key 'data.flip' must be true or false, got 3"),
        ("data.crop_scale=(1,)", "config key 'data.crop_scale' must be"),
        ("model.fusion.tokens=(4,2,a)", "config key 'model.fusion.tokens' must be"),
    ],
)
def test_wrong_key_or_type(override, message):
    with pytest.raises(UserError) as error:
        _load(override)
    assert message in str(error.value)


def test_a_length_replaces_the_other(capsys):
    """The warm-up counts as the length does: that is said."""
    config = recipes.load_recipe("configs/pretrain.py", ["--config.steps=70"])
    assert (config.steps, config.epochs) == (70, 0.0)
    assert "steps=70 replaces epochs=200.0; optimizer.warmup=40.0 counts steps now" in capsys.readouterr().err
    config = _load("epochs=3", "steps=0")
    assert (config.steps, config.epochs) == (0, 3.0) and not capsys.readouterr().err
    with pytest.raises(UserError, match="set exactly one of steps=7 and epochs=3.0"):
        _load("epochs=3", "steps=7")


@pytest.mark.parametrize(
    "override,message",
    [
        ("batch_size=0", "batch_size=0 must be at least 1"),
        ("optimizer.schedule=step", "optimizer.schedule='step' must be one of cosine, constant, wsd"),
        ("optimizer.decay_share=0", "optimizer.decay_share=0.0 must be above 0 and at most 1"),
        ("steps=0", "set exactly one of steps=0 and epochs=0.0"),
        ("grad_accumulation=3", "grad_accumulation=3 must be positive and divide batch_size=64"),
        ("dtype=float16", "dtype='float16' must be one of bfloat16, float32"),
        ("remat=some", "remat='some' must be one of"),
        ("scan_layers=yes", "scan_layers='yes' must be one of auto, on, off"),
        ("model.image.mask_ratio=1", "mask_ratio=1.0 must be between 0 and 1"),
        ("model.audio.mask_ratio=0", "mask_ratio=0.0 must be between 0 and 1"),
        ("model.audio.size=(128,96)", "as many rows as data.sound.mels=64"),
        ("model.image.channels=1", "model.image.channels=1 must be 3"),
        ("model.audio.channels=3", "model.audio.channels=3 must be 1"),
        ("model.image.patch=7", "patch=7 must divide size=(96, 96)"),
        ("data.weights=(1,2,3)", "one positive weight for each of the 2 sets"),
        ("data.weights=(1,-1)", "one positive weight for each of the 2 sets"),
        ("data.crop_scale=(0.9,0.5)", "0 < smallest <= largest <= 1"),
        ("data.workers=-1", "data.workers=-1"),
        ("data.prefetch=0", "data.prefetch=0"),
        ("data.split=", "data.split must name a split"),
        ("data.volume_db=-1", "data.volume_db=-1.0"),
        ("data.max_failure_share=2", "data.max_failure_share=2.0"),
        ("data.sound.std=0", "data.sound.std=0.0"),
        ("data.sound.log_floor=0", "data.sound.log_floor=0.0"),
        ("data.sound.hop=0", "hop=0"),
        ("mesh.data=0", "mesh axes data=0"),
        ("mesh.fsdp=-1", "at most one of them -1"),
        ("optimizer.base_lr=0", "optimizer.base_lr=0.0 must be above 0"),
        ("optimizer.warmup=-1", "optimizer.warmup=-1.0"),
        ("optimizer.b2=1", "b2=1.0 must be at least 0 and below 1"),
        ("checkpoint_every=0", "checkpoint_every=0"),
        ("images_every=-1", "images_every=-1"),
        ("seed=-1", "seed=-1"),
    ],
)
def test_values_are_checked(override, message):
    with pytest.raises(UserError) as error:
        _load(override)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "override,message",
    [
        ("batch_size=1e12", "batch_size=1000000000000 must be at most 1,048,576"),
        ("seed=1e20", "seed=100000000000000000000 must be at most 9,223,372,036,854,775,807"),
        ("seed=1" + 400 * "0", "seed=10000000000000000000… (401 digits) must be at most"),
        ("steps=1e12", "steps=1000000000000 must be at most 2,147,483,647"),
        ("epochs=1e999", "epochs=inf must be finite"),
        ("data.workers=1e6", "workers=1000000 must be at most 4,096"),
        ("data.prefetch=1e9", "prefetch=1000000000 must be at most"),
        ("data.cache=1e30", "cache=1e+30 must be at most"),
        ("data.volume_db=1e9", "volume_db=1000000000.0 must be at most 120"),
        ("data.mix=1e9", "data.mix=1000000000 must be 1 (no mixing) to 4 clips"),
        ("data.image_noise=1e999", "image_noise=inf must be finite"),
        ("data.sound.n_fft=1e9", "n_fft=1000000000 must be at most 131,072"),
        ("data.sound.hop=1e9", "hop=1000000000 must be at most"),
        ("data.sound.rate=1e12", "rate=1000000000000 must be at most 768,000"),
        ("data.sound.mels=1e9", "mels=1000000000 must be at most"),
        ("data.sound.mean=1e999", "mean=inf must be finite"),
        ("data.weights=(1e999,1)", "weights=inf must be finite"),
        ("model.image.size=(1e9,1e9)", "size=1000000000 must be at most 16,384"),
        ("model.image.size=(16384,16384)", "in patches of 16 is more than 262,144"),
        ("model.audio.size=(64,16384)", "takes 3656 seconds of audio"),
        ("model.image.patch=1000000000", "patch=1000000000 must be at most"),
        ("model.image.width=1e9", "width=1000000000 must be at most"),
        ("model.image.depth=1e6", "depth=1000000 must be at most 1,024"),
        ("model.image.heads=1e9", "heads=1000000000 must be at most"),
        ("model.image.mlp_ratio=1e9", "mlp_ratio=1000000000.0 must be at most 64"),
        ("model.image.loss_weight=1e30", "loss_weight=1e+30 must be at most"),
        ("model.decoder.depth=1e6", "depth=1000000 must be at most"),
        ("model.decoder.width=1e9", "width=1000000000 must be at most"),
        ("model.fusion.tokens=(1e9,8,8)", "tokens=1000000000 must be at most"),
        ("model.fusion.attention_ratio=1e9", "attention_ratio=1000000000.0 must be at most"),
        ("mesh.data=1e12", "data=1000000000000 must be at most"),
        ("optimizer.base_lr=1e999", "base_lr=inf must be finite"),
        ("optimizer.warmup=1e999", "warmup=inf must be finite"),
        ("hang_seconds=1e999", "hang_seconds=inf must be finite"),
        ("checkpoint_every=1e18", "checkpoint_every=1000000000000000000 must be at most"),
    ],
)
def test_absurd_values_are_refused_before_anything_is_allocated(override, message):
    more = ["data.sound.hop=1785"] if override.startswith("model.audio.size") else []
    with pytest.raises(UserError) as error:
        _load(*more, override)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "recipe, override, message",
    [
        ("reconstruction", "batch_size=1e12", "batch_size=1000000000000 must be at most"),
        ("reconstruction", "bootstrap=1e12", "bootstrap=1000000000000 must be at most 1,000,000"),
        ("reconstruction", "data.clips=1e12", "data.clips=1000000000000 must be at most"),
        ("classification", "test_batch_size=1e12", "test_batch_size=1000000000000 must be at most"),
        ("classification", "head.classes=1e12", "classes=1000000000000 must be at most"),
        ("classification", "bootstrap=1e12", "bootstrap=1000000000000 must be at most"),
        ("segmentation", "head.width=1e9", "width=1000000000 must be at most"),
        ("localization", "head.temperature=1e999", "temperature=inf must be finite"),
        ("separation", "seed=1e20", "seed=100000000000000000000 must be at most"),
        ("compare", "seeds=(100000000000000000000,)", "seeds=100000000000000000000 must be at most"),
    ],
)
def test_absurd_values_of_evaluations_are_refused(recipe, override, message):
    from av_mae.evaluate.__main__ import kind_of

    with pytest.raises(UserError) as error:
        recipes.load_recipe(recipe, [f"--config.{override}"], kind_of)
    assert message in str(error.value)


def test_a_model_of_too_many_parameters_is_refused():
    with pytest.raises(UserError, match="make 52,776,.* parameters, more than 1,000,000,000,000"):
        StreamConfig(width=65536, depth=1024, heads=64)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "must hold an object, it holds list"),
        ("[" * 100_000, "cannot read the config"),
        ('{"seed": 1' + 5000 * "0" + "}", "cannot read the config"),
        ('{"optimizer": {"base_lr": 1' + 400 * "0" + "}}", "base_lr=inf must be finite"),
        (b"\x80", "cannot read the config"),
        ('{"__class__": "os.system"}', "unknown config key '__class__'"),
        ('{"py/object": "os.system"}', "unknown config key 'py/object'"),
        ("{\"seed\": \"__import__('pathlib').Path('canary').touch()\"}", "'seed' must be a whole number"),
        ('{"model": {"image": {"size": "(exec(\'canary\'), 1)"}}}', "'model.image.size' must be"),
        ('{"model": "av_mae.models.AVMAE"}', "'model' is a group of keys"),
    ],
)
def test_a_saved_config_is_only_values(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        recipes.load(tmp_path / "config.json")
    assert message in str(error.value) and not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "spec,message",
    [
        (
            "configs/demos.py",
            "no recipe 'configs/demos.py'; it is a file, or one of the recipes classification, compare, demo",
        ),
        ("configs/pretrain.py:vgsound", "no variant 'vgsound'; did you mean 'vggsound'?; variants: vggsound"),
        ("configs/demo.py:big", "has no variant 'big'"),
    ],
)
def test_wrong_recipe(spec, message):
    with pytest.raises(UserError) as error:
        recipes.load_recipe(spec)
    assert message in str(error.value)


def test_a_file_that_is_no_recipe(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="defines no get_config"):
        recipes.load_recipe(str(tmp_path / "empty.py"))


def test_json_round_trip():
    config = TrainConfig(
        steps=3,
        data=DataConfig(path="a, b", weights=(1.0, 2.0)),
        mesh=MeshConfig(fsdp=2),
        model=AVMAEConfig(image=StreamConfig(patch=(16, 32))),
        optimizer=OptimizerConfig(clip_norm=1.0),
    )
    assert recipes.from_dict(json.loads(json.dumps(recipes.to_dict(config)))) == config
    assert config.data.paths == ("a", "b")


def test_saved_config(tmp_path):
    config = recipes.load_recipe(DEMO)
    recipes.save(config, tmp_path / "config.json")
    assert recipes.load(tmp_path / "config.json") == config
    with pytest.raises(UserError, match="cannot read the config .*missing.json"):
        recipes.load(tmp_path / "missing.json")


def test_keys_name_every_value():
    names = recipes.keys(TrainConfig)
    assert {"steps", "data.path", "data.sound.mels", "model.fusion.pair_attention", "mesh.tensor"} <= set(names)
    groups = sum(dataclasses.is_dataclass(field.type) for field in dataclasses.fields(TrainConfig))
    assert groups == 4 and "data" not in names
    assert len(recipes.keys(SoundConfig)) == 7


def test_command_line():
    import argparse

    parser = argparse.ArgumentParser()
    recipes.add_config_argument(parser)
    arguments, overrides = recipes.parse_arguments(
        parser, ["--config=configs/demo.py", "--config.steps=3", "--config.seed", "4"]
    )
    assert arguments.config == "configs/demo.py" and overrides == ["--config.steps=3", "--config.seed=4"]
    with pytest.raises(SystemExit):
        recipes.parse_arguments(parser, ["--config=configs/demo.py", "--steps=3"])


def test_a_key_of_an_older_run_is_read_under_its_name_of_today():
    """Runs saved before 2026-12 call `data.annotations` `data.truth`."""
    saved = recipes.to_dict(_load("data.annotations=['mask']"))
    assert saved["data"].pop("annotations") == ["mask"]
    assert recipes.from_dict(saved | {"data": saved["data"] | {"truth": ["mask"]}}).data.annotations == ("mask",)
    assert _load("data.truth=label").data.annotations == ("label",)
