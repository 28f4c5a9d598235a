"""vLLM on the CPU: tasks of a `.tall` file, switched in place, give the tokens of transformers.

Run by `make test-vllm`, in an environment of its own.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
import transformers

import tallcodec
from tallcodec import errors
from tallcodec import vllm as plugin

os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
PROMPTS = [[3, 5, 7, 11, 13, 17, 19], [3] * 40, list(range(3, 60))]
TOKENS = 12


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """A folder: f.tall of two tasks of a small Llama, their decoded checkpoints, and serve/."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("family")
    words = {f"w{i}": i for i in range(256)} | {"<unk>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    )
    config = transformers.LlamaConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=256, vocab_size=258, max_position_embeddings=256, bos_token_id=0,
        eos_token_id=257, initializer_range=0.2, dtype="float32")  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        if seed:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    path = folder / "f.tall"
    tasks = {name: folder / name for name in ("a", "b")}
    tallcodec.encode(folder / "base", tasks, path, method={"a": "tall", "b": "ternary"})
    with tallcodec.open(path) as file:
        for task in (None, *tasks):
            file.save(task, folder / f"decoded-{task}")
        plugin.write_folder(file, "a", folder / "serve")
    return folder


@pytest.fixture(scope="session")
def expected(family):
    """Greedy tokens of transformers on the decoded checkpoint, by task."""
    tokens = {}
    for task in (None, "a", "b"):
        model = transformers.LlamaForCausalLM.from_pretrained(family / f"decoded-{task}").eval()
        tokens[task] = [
            model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False)[
                0, len(prompt):
            ].tolist()
            for prompt in PROMPTS
        ]  # fmt: skip
    assert tokens["a"] != tokens["b"] != tokens[None] != tokens["a"]
    return tokens


def test_python_api(family, expected):
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(family / "serve"), load_format="tall", dtype="float32", max_model_len=128,
        enforce_eager=True, enable_prefix_caching=True,
        model_loader_extra_config={"file": str(family / "f.tall"), "task": "a"},
        worker_extension_cls="tallcodec.vllm.Switching")  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]

    def tokens():
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    assert tokens() == expected["a"]
    for task in ("b", None, "a", "b"):
        plugin.switch(llm, task)
        assert tokens() == expected[task]
    with pytest.raises(Exception, match="has no task 'none'"):
        plugin.switch(llm, "none")
    assert tokens() == expected["b"]
    damaged = bytearray((family / "f.tall").read_bytes())
    with tallcodec.open(family / "f.tall") as file:
        damaged[next(p[2] for p in file._file.planes() if p[0] == 3)] ^= 1  # a mask: of task a
    (family / "damaged.tall").write_bytes(damaged)
    os.replace(family / "f.tall", family / "kept.tall")
    os.replace(family / "damaged.tall", family / "f.tall")
    try:
        plugin.switch(llm, "a")  # of the file that it has open
        assert tokens() == expected["a"]
    finally:
        os.replace(family / "kept.tall", family / "f.tall")


def test_http(family, expected):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    extra = json.dumps({"file": str(family / "f.tall"), "task": "a"})
    log = open(family / "server.log", "wb")
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model",
         str(family / "serve"), "--served-model-name", "m", "--load-format", "tall",
         "--model-loader-extra-config", extra, "--worker-extension-cls",
         "tallcodec.vllm.Switching", "--dtype", "float32", "--max-model-len", "128",
         "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)],
        env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"}, stdout=log, stderr=log)  # fmt: skip

    def post(path, body=None):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}", json.dumps(body or {}).encode(),
            {"Content-Type": "application/json"})  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read()

    def tokens():
        body = {"model": "m", "prompt": PROMPTS, "max_tokens": TOKENS, "temperature": 0,
                "return_token_ids": True}  # fmt: skip
        choices = json.loads(post("/v1/completions", body))["choices"]
        return [choice["token_ids"] for choice in sorted(choices, key=lambda c: c["index"])]

    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (family / "server.log").read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(1)
        assert tokens() == expected["a"]
        for task in ("b", "a"):
            post("/collective_rpc", {"method": "switch_task", "args": [task]})
            post("/reset_prefix_cache")
            assert tokens() == expected[task]
        with pytest.raises(urllib.error.HTTPError):
            post("/collective_rpc", {"method": "switch_task", "args": ["none"]})
        assert tokens() == expected["a"]
    finally:
        server.terminate()
        server.wait(60)


def test_configuration_that_names_no_file():
    with pytest.raises(errors.ArgumentError, match="needs model_loader_extra_config"):
        plugin._opened({"task": "a"})
    with pytest.raises(errors.ArgumentError, match="needs model_loader_extra_config"):
        plugin._opened({"file": "a.tall", "tsk": "a"})
