"""What of upstream's tests is not passed or not run, and why.

The tables are in use: a run fails when a test of the first passes, and for a skip that is not in the second.
"""

# Tests that fail. Upstream leaves this one out of its own models with towers of timm.
FAILING = {
    "test_get_image_features_attentions": "a timm tower gives no attentions",
}

# Parts of tests, by upstream's switch for them.
SWITCHED_OFF = {
    "skip_test_image_features_output_shape": (
        "the last hidden state of a convolutional tower is [B, C, H, W], and Swin's width is not its `embed_dim`; "
        "on for ViT"
    ),
}

# Tests that upstream itself skips: how its reason begins, and why that holds for this model or this machine.
SKIPPED_UPSTREAM = {
    "test requires accelerator": "made for a GPU",
    "test requires multiple accelerators": "made for several GPUs",
    "test requires Flash Attention": "made for a GPU",
    "test requires MPS": "made for a Mac",
    "test requires deepspeed": "made for several GPUs",
    "test requires the kernels library": "made for a GPU",
    "test requires librosa": "audio",
    "test requires Torchcodec": "video",
    "test is slow": "run with RUN_SLOW=1, as `make conformance` does",
    "No conversion found": "the weights have had their names from the beginning",
    "Only PrefixChange conversions found": "so have those of CLIP's towers, but for a prefix",
    "No decoder-only language modeling head": "encoders only",
    "No sequence-to-sequence language modeling head": "encoders only",
    "MiniClipModel does not support grouped_mm": "no mixture of experts",
    "This model has no sparse experts": "no mixture of experts",
    "This model has no `output_router_logits`": "no mixture of experts",
    "This model doesn't use `inputs_embeds`": "texts are token ids, as CLIP's",
    "MiniClipModel class has no _keep_in_fp32_modules": "every weight may be in half precision",
    "MiniClipModel has no _keep_in_fp32_modules": "every weight may be in half precision",
    "No `_keep_in_fp32_modules_strict` defined": "every weight may be in half precision",
    "Do not take a cache as input to forward": "encoders only",
    "This model has no `base_model_class`": "rotary positions belong to the text tower's own class, tested upstream",
    "Model does not have position embeddings": "positions belong to the text tower's own class, tested upstream",
    "Model does not support sliding window mask": "windows belong to the text tower's own class, tested upstream",
    "MiniClipModel does not support SDPA": "the test is for models of one tower; that for composite models is run",
    "Model does not have a TP plan": "no tensor parallelism: timm's towers have none",
    "Processor has no chat template": "captions, no conversations",
    "Processor doesn't accept chat templates": "captions, no conversations",
    "video_processor attribute not present": "no videos",
    "feature_extractor attribute not present": "no audio",
    "Processor doesn't support `_get_num_multimodal_tokens`": "images do not become tokens of a text",
}

# What else is upstream, and why it is not run.
NOT_RUN = {
    "exporters, generation, utils": "missing from the archive; stand_ins/ has what is imported of them",
    "models with MPNet as text tower": (
        "it has no gradient checkpointing, which upstream's tests take a whole class to have or not; "
        "tests/test_ecosystem.py has such a pair"
    ),
    "test_fsdp_mixin, test_tensor_parallel_mixin, test_expert_parallel_mixin": (
        "need distributed_testing_utils, which is missing from the archive; for language models"
    ),
    "test_pipeline_mixin": (
        "its cases, one a task, are missing from the archive, its models on the Hub; tests/test_pipelines.py has both"
    ),
    "test_image_processing_common, test_tokenization_common": "the classes are upstream's own, and tested there",
}


def skip_reason(reason: str) -> str | None:
    """The entry of the table of skips that a reason begins with; None if there is none."""
    return next((start for start in SKIPPED_UPSTREAM if reason.removeprefix("Skipped: ").startswith(start)), None)
