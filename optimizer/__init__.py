"""fxpress: a compiler for trained PyTorch models.

`optimize(model, calib_data)` captures a model as a graph, watches it run on calibration data, and
rewrites it into a smaller, faster one that can be inspected pass by pass.
"""
