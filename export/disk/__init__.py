"""Files of many gigabytes, read and written a few rows at a time, all or nothing.

:mod:`files` and :mod:`resume` keep an interruption from harm; :mod:`spans` are pieces of files and
:mod:`numbers` what their bytes mean. An ONNX file that is not loaded: :mod:`wire` walks its
protobuf, :mod:`onnx_file` says where each weight lies, :mod:`splice` and :mod:`onnx_copy` write it
anew around some of them. :mod:`safetensors_file` and :mod:`base_folder` do the same for
checkpoints; :mod:`base_targets` and :mod:`naming` take the paths of modules to the names in them.
"""
