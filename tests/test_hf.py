"""transformers' models from a file, and switched in place, as from the decoded checkpoint."""

import json

import pytest

import tallcodec
from tallcodec import errors, hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tuning import save_tuned  # noqa: E402

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 64}  # fmt: skip
TEXT = SMALL | {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VISION = SMALL | {"image_size": 32, "patch_size": 8}
LLAMA = TEXT | {"num_key_value_heads": 1}

MODELS = {
    "BERT": ("BertForSequenceClassification", "BertConfig", TEXT | {"num_labels": 3}),
    "ViT": ("ViTForImageClassification", "ViTConfig", VISION),  # renamed on loading
    "CLIP": ("CLIPModel", "CLIPConfig", {"text_config": TEXT, "vision_config": VISION}),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "Llama, tied, bfloat16": ("LlamaForCausalLM", "LlamaConfig",
                              LLAMA | {"tie_word_embeddings": True, "dtype": "bfloat16"}),
    # Two tensors of every expert are parts of one parameter.
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", LLAMA | {"num_local_experts": 3}),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", TEXT),  # joined projections in the checkpoint, too
}  # fmt: skip


def inputs(model):
    ids = torch.arange(12).view(2, 6) + 3
    pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    name = type(model).__name__
    if name.startswith("ViT"):
        return {"pixel_values": pixels.to(model.dtype)}
    if name.startswith("CLIP"):
        return {"input_ids": ids, "pixel_values": pixels}
    return {"input_ids": ids}


def output(model):
    with torch.no_grad():
        result = model.eval()(**inputs(model))
    return result.logits_per_image if "logits_per_image" in result else result.logits


@pytest.fixture(scope="module", params=MODELS)
def family(request, tmp_path_factory):
    """A folder with base/, two tasks and a file of them; the class."""
    name, config, options = MODELS[request.param]
    cls = getattr(transformers, name)
    folder = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    config = getattr(transformers, config)(**options)
    model = cls(config).to(config.dtype or torch.float32)
    model.save_pretrained(folder / "base")
    save_tuned(model, folder, ("a", "b"), 0.05)
    path = folder / "f.tall"
    tasks = {task: folder / task for task in ("a", "b")}
    tallcodec.encode(folder / "base", tasks, path, method={"a": "tall", "b": "ternary"})
    with tallcodec.open(path) as file:
        for task in tasks:
            file.save(task, folder / f"decoded-{task}")
        file.save(None, folder / "decoded-None")
    return folder, cls


def assert_equal(found, expected):
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    assert torch.equal(output(found), output(expected))


@pytest.mark.parametrize("task", [None, "a", "b"])
def test_from_pretrained_is_that_of_the_decoded_checkpoint(family, task):
    folder, cls = family
    expected = cls.from_pretrained(folder / f"decoded-{task}")
    model = hf.from_pretrained(folder / "f.tall", task)
    assert type(model) is cls
    assert_equal(model, expected)
    with tallcodec.open(folder / "f.tall") as file:
        assert_equal(hf.from_pretrained(file, task, cls), expected)


@pytest.mark.parametrize("made", ["from_pretrained", "from_config"])
def test_switching_is_exact_and_in_place(family, made):
    folder, cls = family
    if made == "from_pretrained":
        model = cls.from_pretrained(folder / "base")
    else:
        config = transformers.AutoConfig.from_pretrained(folder / "base")
        model = cls._from_config(config, dtype=config.dtype)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    expected = {task: cls.from_pretrained(folder / f"decoded-{task}") for task in (None, "a", "b")}
    with tallcodec.Switcher(model, folder / "f.tall") as switcher:
        for task in ("a", "b", None, "b", "a", None):
            switcher.switch(task)
            assert_equal(model, expected[task])
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_options_are_those_of_the_class(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA)
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.max_new_tokens = 77
    for name in ("base", "t"):
        model.save_pretrained(tmp_path / name)
    tallcodec.encode(tmp_path / "base", {"t": tmp_path / "t"}, tmp_path / "f.tall")

    def load(**options):
        return hf.from_pretrained(tmp_path / "f.tall", "t", **options)

    assert load().generation_config.max_new_tokens == 77
    assert not load(use_cache=False).config.use_cache
    assert load(dtype="bfloat16").dtype == torch.bfloat16
    given = transformers.GenerationConfig(max_new_tokens=5)
    assert load(generation_config=given).generation_config.max_new_tokens != 77
    model, info = load(output_loading_info=True)
    assert not info["missing_keys"] and model.generation_config.max_new_tokens == 77
    many = load(cls=transformers.AutoModelForSequenceClassification, num_labels=5)
    assert many.score.weight.shape == (5, 32)


def test_auto_classes_and_models_without_the_prefix(tmp_path):
    """A file of models with a head, and the base model alone; and the other way about."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**TEXT)
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path / "t")
    path = tmp_path / "f.tall"
    tallcodec.encode(tmp_path / "base", {"t": tmp_path / "t"}, path)
    with tallcodec.open(path) as file:
        expected = file.decode("t")
    for cls in (transformers.AutoModel, transformers.BertModel):
        bare = hf.from_pretrained(path, "t", cls)
        assert type(bare) is transformers.BertModel
        assert torch.equal(bare.pooler.dense.weight, expected["bert.pooler.dense.weight"])
    whole = hf.from_pretrained(path, None, transformers.AutoModelForSequenceClassification)
    assert type(whole) is transformers.BertForSequenceClassification
    bare = transformers.BertModel.from_pretrained(tmp_path / "base")
    with pytest.raises(errors.TensorMismatchError, match="2 tensors that only the file has"):
        tallcodec.Switcher(bare, path)
    with tallcodec.Switcher(bare, path, task="t", strict=False):
        assert torch.equal(bare.pooler.dense.weight, expected["bert.pooler.dense.weight"])
    with pytest.raises(errors.ArgumentError, match="no class for a 'bert'"):
        hf.from_pretrained(path, "t", transformers.AutoModelForImageClassification)

    bare.save_pretrained(tmp_path / "bare")
    transformers.BertModel.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "zero")
    path = tmp_path / "bare.tall"
    tallcodec.encode(tmp_path / "zero", {"t": tmp_path / "bare"}, path)
    with tallcodec.open(path) as file:
        expected = file.decode("t")
    whole = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    with tallcodec.Switcher(whole, path, task="t", strict=False):
        weight = whole.bert.pooler.dense.weight
        assert torch.equal(weight, expected["pooler.dense.weight"])


def test_targets_are_the_checkpoints_names(family):
    folder, cls = family
    model = cls.from_pretrained(folder / "base")
    with tallcodec.open(folder / "f.tall") as file:
        names = set(file.tensors)
    targets = hf.targets(model)
    tied = {"lm_head.weight"} if model.config.to_dict().get("tie_word_embeddings") else set()
    assert names <= targets.keys() and targets.keys() - names <= tied
    with torch.no_grad():
        for tensor in targets.values():
            tensor.fill_(0.5)
    assert all((t == 0.5).all() for t in model.state_dict().values() if t.is_floating_point())


def test_a_checkpoint_without_configuration(tmp_path):
    base = {"w": torch.zeros(4)}
    tallcodec.encode(base, {"t": {"w": torch.ones(4)}}, tmp_path / "a.tall")
    with pytest.raises(errors.ArgumentError, match="task 't' has no config.json"):
        hf.from_pretrained(tmp_path / "a.tall", "t")
    with pytest.raises(errors.TaskNotFoundError):
        hf.from_pretrained(tmp_path / "a.tall", "none")


def test_a_class_that_is_not_transformers(tmp_path):
    for name in ("base", "t"):
        (tmp_path / name).mkdir()
        torch.save({"w": torch.ones(4) * len(name)}, tmp_path / name / "pytorch_model.bin")
        config = {"model_type": "bert", "architectures": ["MyModel"]}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    tallcodec.encode(tmp_path / "base", {"t": tmp_path / "t"}, tmp_path / "a.tall")
    with pytest.raises(errors.ArgumentError, match="'MyModel'.*pass cls"):
        hf.from_pretrained(tmp_path / "a.tall", "t")


def test_elements_in_no_regular_order_are_refused():
    with pytest.raises(errors.SwitchError, match="no regular order"):
        hf._view(torch.zeros(4, 2), torch.tensor([[0, 1], [4, 5], [2, 3]]), "w")
    view = hf._view(torch.arange(12.0).view(3, 4), torch.tensor([[1, 5, 9], [2, 6, 10]]), "w")
    assert torch.equal(view, torch.tensor([[1.0, 5, 9], [2, 6, 10]]))
