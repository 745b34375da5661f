"""Share a model.

export.py: write model, processor, code and card to a folder
model_card.py: the measured card
push.py: upload an export, verified before it becomes visible
verify_upload.py: load an uploaded export in a fresh process
onnx_export.py: each tower as ONNX, with proof of equality
onnx_example.py: the example that is written next to the ONNX files
"""
