"""Fine-tuning that keeps what a model knew.

lora.py: `--lora_rank`: adapters in the towers, merged for the export
retention.py: `--retention_dataset`: images that must still be found
blend.py: `--blend`: weights between those before and after training
"""
