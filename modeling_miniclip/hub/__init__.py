"""Share a model.

export.py: write model, processor, code and card to a folder
renew_code.py: give an export of an earlier release the code of this one
model_card.py: fill in the model card and rename it
push.py: upload an export, verified before it becomes visible
verify_upload.py: load an uploaded export in a fresh process
onnx_export.py: write each tower as ONNX and compare it with PyTorch
onnx_quantize.py: turn these files into int8 ones, and measure what that changes
onnx_example.py: standalone example that is written next to the ONNX files
"""
