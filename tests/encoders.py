"""Tiny frozen encoders with random weights, of the real classes, in folders as transformers writes them."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)


WIDTH = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT_WIDTH = {**WIDTH, "vocab_size": 300}


def text_tokenizer(captions, padding_side="right"):
    """A byte-level BPE that puts a start before a text and an end behind it; it takes 14 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "padding_side": padding_side}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=14, **names)


CLIP_TEXT = {**TEXT_WIDTH, "max_position_embeddings": 14, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def text_encoder(kind):
    """T5, CLIP's text model, BERT, or a decoder."""
    torch.manual_seed(5)
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
        return T5EncoderModel(T5Config(vocab_size=300, **sizes)).eval()
    if kind == "clip":
        return CLIPTextModel(CLIPTextConfig(**CLIP_TEXT)).eval()
    if kind == "bert":
        return BertModel(BertConfig(**TEXT_WIDTH, max_position_embeddings=14)).eval()
    return GPT2Model(GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=14)).eval()


def image_encoder(kind):
    torch.manual_seed(6)
    if kind == "dinov2":
        return Dinov2Model(Dinov2Config(**{**WIDTH, "image_size": 16, "patch_size": 8})).eval()
    return CLIPVisionModel(CLIPVisionConfig(**WIDTH, image_size=16, patch_size=8)).eval()


def feature_extractor():
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def whole_clip():
    """Both towers in one repository, as CLIP's are published."""
    torch.manual_seed(7)
    vision = {**WIDTH, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=CLIP_TEXT, vision_config=vision)).eval()


def save(folder, encoder, beside):
    """As a folder of transformers."""
    encoder.save_pretrained(folder)
    beside.save_pretrained(folder)
    return folder
