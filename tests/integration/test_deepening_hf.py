"""Hugging Face models get one more layer, and their configs say so."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.kasmina.depth.deepen import insert
from esper.kasmina.depth.stacks import find_stacks
from esper.saving import save as saving

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
IDS = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def gpt2() -> Any:
    given = {"vocab_size": 11, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**given, bos_token_id=1, eos_token_id=2))


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=1))


def qwen() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8))


MODELS = {
    "gpt2": (gpt2, "transformer.h+block", "n_layer"),
    "llama": (llama, "model.layers+block", "num_hidden_layers"),
    "qwen": (qwen, "model.layers+block", "num_hidden_layers"),
}


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_one_more_layer_changes_nothing_and_the_config_counts_it(kind: str, tmp_path: Path) -> None:
    made, site, depth = MODELS[kind]
    torch.manual_seed(0)
    net: nn.Module = made()
    loaded = copy.deepcopy(net)
    stacks, _ = find_stacks(net, lambda: net(IDS, labels=IDS).loss, 3)
    (stack,) = stacks
    assert stack.site.name == site
    before = net.eval()(IDS).logits
    spoken = net.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    plan = stack.deepening()
    insert(net, plan, stack.block(3))
    assert getattr(net.config, depth) == 3
    assert torch.equal(net(IDS).logits, before)
    assert torch.equal(net.generate(IDS[:1], max_new_tokens=4, do_sample=False), spoken)  # with a cache
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        net.train()(IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in net.get_submodule(site[:-6] + ".2").parameters())
    with torch.no_grad():
        expected = net.eval()(IDS).logits
        net.save_pretrained(tmp_path / "theirs")
        theirs = type(net).from_pretrained(tmp_path / "theirs").eval()
        assert torch.equal(theirs(IDS).logits, expected)
    saving.save(net, [plan], tmp_path / "ours", card={})
    esper.load_into(loaded, tmp_path / "ours")
    assert torch.equal(loaded.eval()(IDS).logits, expected)
    assert getattr(loaded.config, depth) == 3


def test_bert_is_refused_with_the_reason() -> None:
    net = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))
    stacks, refusals = find_stacks(net, lambda: net(IDS, labels=IDS).loss, 3)
    assert stacks == []
    assert "post-norm" in refusals[0].reason
