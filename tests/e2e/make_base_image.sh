#!/usr/bin/env bash
# Makes an image that stands in for python:3.11-slim, where no container registry is reachable:
# a minimal Debian 12 with its Python 3.11, and g++ so that the executor's image needs no network.
#
# usage: tests/e2e/make_base_image.sh [TAG]      needs root, debootstrap and docker
#   TAG             default: stepwire-base:bookworm; pass it on as STEPWIRE_BASE_IMAGE
#   DEBIAN_MIRROR   address of a Debian mirror; default: debootstrap's own
set -euo pipefail

tag=${1:-stepwire-base:bookworm}
packages=ca-certificates,python3,python3-venv,g++

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include="$packages" bookworm "$root" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"}
# The official image calls it python, in /usr/local/bin.
ln -s /usr/bin/python3 "$root/usr/local/bin/python"
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
tar -C "$root" --exclude=./proc/* --exclude=./sys/* --exclude=./dev/* -c . | docker import - "$tag"
