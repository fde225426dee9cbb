#!/usr/bin/env bash
# What tests/system needs beside Python packages, from Debian: Slurm, ssh and pdsh, network tools, shellcheck. Installs
# where it may and says what it did; where it may not, those tests skip and say so. No daemon is started.
set -u
packages=(slurmctld slurmd slurm-client munge pdsh openssh-server shellcheck iproute2)
missing=()
for package in "${packages[@]}"; do
    dpkg-query --show --showformat '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ "${#missing[@]}" -eq 0 ]; then
    echo "test-system: all packages are installed: ${packages[*]}"
    exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "test-system: not root on Debian or Ubuntu, so not installed: ${missing[*]}; tests that need them are skipped"
    exit 0
fi
# Debian starts daemons when it installs them; here the tests start their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
if apt-get update -qq && apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null; then
    echo "test-system: installed: ${missing[*]}"
else
    echo "test-system: apt-get could not install ${missing[*]}; tests that need them are skipped"
fi
