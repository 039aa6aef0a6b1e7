"""What a training will need, calculated before a GPU is touched: memory, time, disk, communication.

``workload`` states the sizes, ``flops``, ``memory``, ``storage`` and ``communication`` hold one set of
formulas each, ``parameters`` counts on the meta device, ``report`` puts it together for
:mod:`dinov2.train.plan`.
"""
