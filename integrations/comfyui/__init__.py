"""DGUNet in ComfyUI: copy this folder to ComfyUI/custom_nodes/dgunet, and weights to ComfyUI/models/upscale_models.

ComfyUI's own nodes "Load Upscale Model" and "Upscale Image (using Model)" then restore images, at their own size. Needs
dgunet in ComfyUI's environment (``pip install ".[spandrel]"`` in a clone).
"""

from dgunet.integrations.spandrel import install

install()
NODE_CLASS_MAPPINGS = {}  # no nodes of its own
