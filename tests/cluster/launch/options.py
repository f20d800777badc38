"""Options of `aligntune launch` that several tests give."""

from __future__ import annotations

HOSTS = ["--head-ip", "10.0.0.1", "--worker-ips", "10.0.0.2,10.0.0.3", "--storage", "/shared"]
VENV = ["--venv", "/opt/aligntune"]
AWS = [
    *("--provider", "aws", "--region", "us-west-2", "--instance-type", "p4d.24xlarge"),
    *("--storage", "/shared", "--nfs", "fs-1:/"),
]
IMAGE = ["--image-id", "ami-0123456789abcdef0"]
URL = ["--install", "git+https://git.example/aligntune"]
OPEN = ["policy.resources.gpus=auto", "rollout.resources.gpus=auto"]
