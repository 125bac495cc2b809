#!/usr/bin/env bash
# Debian's SLURM for the tests, as root. The tests start their own daemons, without anything in /etc but this machine's
# name: SLURM listens on 127.0.0.1 only where the name resolves to it.
set -euo pipefail
if ! { command -v slurmctld && command -v slurmd && command -v sbatch && command -v munged; } >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null
fi
name=$(hostname -s)
if [[ $(getent ahostsv4 "$name" | awk '{print $1; exit}') != 127.0.0.1 ]]; then
  hosts=$(cat /etc/hosts)
  printf '127.0.0.1 %s\n%s\n' "$name" "$hosts" >/etc/hosts # in place: containers mount this file
fi
