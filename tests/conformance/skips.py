"""What of upstream's tests is not run, and why. Both tables are in use: conftest.py fails a run that leaves them."""

# Tests that are skipped here.
SKIPPED = {
    "test_get_image_features_attentions": "a timm tower gives no attentions",
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
    "test_fsdp_mixin, test_tensor_parallel_mixin, test_expert_parallel_mixin": (
        "need distributed_testing_utils, which is missing from the archive; for language models"
    ),
    "test_training_mixin": "trains language models on the labels of tokens; tests/test_quality.py trains this model",
    "test_pipeline_mixin": "takes its models from a list on the Hub; tests/test_pipelines.py has the pipelines",
    "test_image_processing_common, test_tokenization_common": "the classes are upstream's own, and tested there",
}


def skip_reason(reason: str) -> str | None:
    """What of the tables a skip's reason is; None if it is in neither."""
    known = [*SKIPPED.values(), *SKIPPED_UPSTREAM]
    return next((start for start in known if reason.removeprefix("Skipped: ").startswith(start)), None)
