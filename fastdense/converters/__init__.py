"""The DenseNets people have: reading what a module computes off its structure, and the same module, fused.

A dense layer is norm-ReLU-conv1x1-norm-ReLU-conv3x3, or norm-ReLU-conv3x3, and a dropout, wherever its implementation
keeps these; a dense block is layers of one class, each reading as many channels as there are so far; a transition is
norm-ReLU-conv1x1 and a pool. What a forward does with them, a structure does not say. So it is tried: the fused module
must give the numbers of the original on a probe (:mod:`.probe`).

============================ ================================================= ===================================
source                       dense block                                       what differs
============================ ================================================= ===================================
torchvision, :mod:`.stock`   ``_DenseBlock(ModuleDict)``                       becomes fastdense's own classes
timm                         ``DenseBlock(ModuleDict)``                        norms carry the ReLU
MONAI                        ``_DenseBlock(Sequential)``, ``layer.layers``     Dropout2d; a layer concatenates
torchxrayvision              ``_DenseBlock(Sequential)``                       a layer concatenates
segmentation_models_pytorch  torchvision's                                     calls the parts of transitions
gpleiss                      ``_DenseBlock(Module)``, ``efficient``            a layer takes ``*features``
FC-DenseNet                  ``DenseBlock(..., upsample)``, ``block.layers``   biases; Dropout2d; only new features
kuangliu, phlippe            ``Sequential``; ``layer.net``                     ``cat([new, x])``; functional ReLU
============================ ================================================= ===================================

The libraries' classes are known by name. The others live in users' own files under any name: they are known by what
they compute, as is every other implementation of the same structure.
"""
