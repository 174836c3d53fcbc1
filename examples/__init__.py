"""Real models on real data: ``python -m custom_ops demo``, or each example by itself.

python -m custom_ops.examples.rank_mslr        learning to rank web pages
python -m custom_ops.examples.bev_lidar        a bird's-eye view of LiDAR scans
python -m custom_ops.examples.spiking_digits   a spiking network reading digits, with a surrogate gradient and without
python -m custom_ops.examples.autograd_tour    the classic lessons of autograd, each result checked
"""
