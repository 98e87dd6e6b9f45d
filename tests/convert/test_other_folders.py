"""Folders that are no checkpoints in safetensors: one line says what they are and what to do."""

import pytest

from kvrun.convert.source import open_checkpoint
from kvrun.errors import ConvertError
from support.make_checkpoint import CONFIG, hf_folder, write_json


def folder_of(tmp_path, files, config=True):
    """A folder with these files, which are empty unless a value is given as JSON, and folders where a name ends so."""
    folder = tmp_path / "it"
    folder.mkdir()
    if config:
        write_json(folder / "config.json", CONFIG)
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (folder / name).mkdir()
        elif value is None:
            (folder / name).write_bytes(b"")
        else:
            write_json(folder / name, value)
    return folder


def refusal(folder):
    with pytest.raises(ConvertError) as caught:
        open_checkpoint(str(folder), tokenizer=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize(
    "files, name, says",
    [
        (["pytorch_model.bin", "training_args.bin"], "pytorch_model.bin", "pickles are refused"),
        (["optimizer.pt", "model_00.pt"], "model_00.pt", "pickles are refused"),
        (["consolidated.00.pth", "params.json"], "consolidated.00.pth", "the format of Meta or Mistral"),
        (["consolidated.safetensors", "tekken.json"], "consolidated.safetensors", "the format of Meta or Mistral"),
        (["zero_to_fp32.py", "global_step9/"], "global_step9", "parts of a training run"),
        (["__0_0.distcp", ".metadata"], "__0_0.distcp", "parts of a training run"),
        (["ggml-model-q4_0.bin"], "ggml-model-q4_0.bin", "GGML, the format before GGUF"),
        (["tf_model.h5"], "tf_model.h5", "from_tf=True"),
        (["flax_model.msgpack"], "flax_model.msgpack", "from_flax=True"),
        (["onnx/model.onnx"], "onnx", "ONNX, which kvrun does not read; convert the checkpoint that it was made from"),
        (["model.onnx", "model.onnx_data"], "model.onnx", "ONNX"),
        (["openvino_model.bin", "openvino_model.xml"], "openvino_model.bin", "OpenVINO"),
        (["model.bin", "vocabulary.json"], "vocabulary.json", "CTranslate2"),
        (["rank0.engine"], "rank0.engine", "TensorRT"),
        (["gemma.task"], "gemma.task", "LiteRT"),
        (["weights.00.npz"], "weights.00.npz", "arrays of NumPy or MLX"),
        (["model_index.json", "unet/"], "model_index.json", "a pipeline of diffusers"),
    ],
)
def test_other_formats(tmp_path, files, name, says, config):
    folder = folder_of(tmp_path, dict.fromkeys(files), config)
    message = refusal(folder)
    assert message.startswith(f"{folder / name}: ") and says in message


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize(
    "settings, says",
    [
        ({"peft_type": "LORA"}, "an adapter (LORA), not a model; merge it into its base model first and"),
        (
            {"peft_type": "LORA", "base_model_name_or_path": "org/Base-1B"},
            "model org/Base-1B first and convert the result: PeftModel.from_pretrained(AutoModelForCausalLM.from_",
        ),
        (
            {"peft_type": 7, "base_model_name_or_path": ""},
            "an adapter, not a model; merge it into its base model first",
        ),
        ({}, "an adapter, not a model"),
    ],
)
def test_adapters(tmp_path, settings, says, config):
    folder = folder_of(tmp_path, {"adapter_config.json": settings, "adapter_model.safetensors": None}, config)
    assert says in refusal(folder)


def test_other_adapters(tmp_path):
    folder = folder_of(
        tmp_path,
        {"adapters.safetensors": None, "adapter_config.json": {"fine_tune_type": "lora", "model": "some/base"}},
        config=False,
    )
    assert "an adapter (lora), not a model; merge it into its base model some/base" in refusal(folder)
    assert refusal(folder).endswith(": mlx_lm.fuse")
    (folder / "adapter_config.json").write_text("[")
    assert "adapter_config.json: not valid JSON" in refusal(folder)


def test_a_model_beside_an_adapter(tmp_path):
    """The model is there in whole: it is taken, and a line says that the adapter is not."""
    folder = hf_folder(tmp_path / "hf")
    write_json(folder / "adapter_config.json", {"peft_type": "LORA"})
    (folder / "adapter_model.safetensors").write_bytes(b"")
    line = "adapter_model.safetensors, an adapter beside the model, which is converted without it"
    assert open_checkpoint(str(folder), tokenizer=False).surplus == (line,)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "consolidated.safetensors").write_bytes(b"")
    (folder / "original.pth").write_bytes(b"")
    assert open_checkpoint(str(folder), tokenizer=False).surplus == ()


def test_folders_around_a_checkpoint(tmp_path):
    hf_folder(tmp_path / "around" / "inside")
    assert refusal(tmp_path / "around").endswith(f"checkpoint; {tmp_path / 'around' / 'inside'} has one")
    cache = tmp_path / "models--org--name"
    hf_folder(cache / "snapshots" / "0123")
    assert refusal(cache).endswith(f"checkpoint; {cache / 'snapshots' / '0123'} has one")


def test_only_settings(tmp_path):
    assert refusal(folder_of(tmp_path, {"tokenizer.json": {}})).endswith(
        "no safetensors file with weights (model.safetensors)"
    )
    (tmp_path / "it" / "config.json").unlink()
    assert refusal(tmp_path / "it").endswith("no config.json: not a Hugging Face checkpoint")
    (tmp_path / "it" / "m.gguf").write_bytes(b"")
    assert refusal(tmp_path / "it").endswith(f"to convert a GGUF file give its name: {tmp_path / 'it' / 'm.gguf'}")


def test_links_to_nothing(tmp_path):
    folder = folder_of(tmp_path, {})
    (folder / "model.safetensors.index.json").symlink_to("gone")
    assert "model.safetensors.index.json: cannot read" in refusal(folder)
    (folder / "model.safetensors").symlink_to("gone")
    assert "model.safetensors: cannot read" in refusal(folder)
