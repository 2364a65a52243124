"""A real S3 server on loopback, in a process of its own: moto's.

python s3_server.py BUCKET
"""

from __future__ import annotations

import logging
import sys

import boto3
from moto.server import ThreadedMotoServer


def main(bucket: str) -> None:
    """Serve until the pipe that is read is closed; the first line that is printed is the endpoint."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="any",
        aws_secret_access_key="any",
    )
    client.create_bucket(Bucket=bucket)
    print(endpoint, flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main(sys.argv[1])
