#!/bin/bash
# A real SLURM on one machine, for tests: start_slurm.sh start|stop|status. Plain child processes, no systemd, no
# cgroups, every port on 127.0.0.1, all state under one folder, nothing written to /etc, no accounting. Root, or any user.
#   apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
# SLURM_LAB=folder (required)   SLURM_NODES=k: virtual nodes n1..nk   SLURM_FAKE="cpus mem_mb gpus" of each node
# PREEMPT_USR=0: preemption sends SIGTERM only   GRACE=seconds of it   P_CTLD, P_D: ports; P_D+1... are further nodes'
# The last node has the feature "away", the others "calm", so that a job can be preempted alone.
#
# What is as it is for a reason:
#  - PID 1 of a container reaps nothing: the daemons run in the foreground as children of setsid, stopped by their pids.
#  - munged refuses parents that others can write, and a key that others can read.
#  - SlurmdParameters=config_overrides: nodes may claim more than the machine has.
#  - `hostname -s` must resolve to exactly 127.0.0.1: NoInAddrAny binds srun to it.
#  - Without any IPv4 but 127.x glibc resolves not even 127.0.0.1 (AI_ADDRCONFIG).
#  - cred_expire is also the wait before a requeued job may start again.
#  - preempt_send_user_signal is SlurmctldParameters up to 22.05 and PreemptParameters=send_user_signal later.
#  - GRES are plain files: CUDA_VISIBLE_DEVICES stays unset.
set -euo pipefail
LAB=${SLURM_LAB:?the folder for all state}
HOST=$(hostname -s) ME=$(id -un) K=${SLURM_NODES:-1} P_CTLD=${P_CTLD:-16817} P_D=${P_D:-16830}
export SLURM_CONF=$LAB/slurm.conf

die() {
  echo "start_slurm: $*" >&2
  exit 1
}

spawn() { # NAME COMMAND...: in the background, its pid in pids/NAME
  local name=$1
  shift
  setsid "$@" </dev/null >"$LAB/log/$name.out" 2>&1 &
  echo $! >"$LAB/pids/$name"
}

wait_for() { # COMMAND...: until it succeeds; fails at once when a daemon died
  local end=$((SECONDS + 60)) file
  until timeout 10 "$@" >/dev/null 2>&1; do
    for file in "$LAB"/pids/*; do
      kill -0 "$(cat "$file")" 2>/dev/null || {
        tail -n 15 "$LAB/log/${file##*/}.out" >&2
        die "${file##*/} died"
      }
    done
    [ $SECONDS -lt $end ] || die "timed out on: $*"
    sleep 0.1
  done
}

check_names() {
  local address
  getent ahostsv4 127.0.0.1 >/dev/null || die "there is only 127.x here: ip addr add 192.0.2.1/32 dev lo"
  address=$(getent ahostsv4 "$HOST" | awk '{print $1; exit}') || true
  [ "$address" = 127.0.0.1 ] || die "'$HOST' resolves to '${address:-nothing}': put '127.0.0.1 $HOST' first in /etc/hosts"
}

write_nodes() { # CPUS MEM_MB GPUS: the last lines of slurm.conf, and gres.conf
  local gres="" i
  : >"$LAB/gres.conf"
  if [ "$3" -gt 0 ]; then
    gres="Gres=gpu:$3"
    for i in $(seq 0 $(($3 - 1))); do : >"$LAB/own/gpu$i"; done
    echo "NodeName=n[1-$K] Name=gpu File=$LAB/own/gpu[0-$(($3 - 1))]" >"$LAB/gres.conf"
  fi
  for i in $(seq "$K"); do
    echo "NodeName=n$i NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((P_D + i - 1)) CPUs=$1 RealMemory=$2 $gres" \
      "Feature=$([ "$i" = "$K" ] && echo away || echo calm) State=UNKNOWN"
  done >>"$LAB/slurm.conf"
}

write_conf() {
  local signals=""
  [ "${PREEMPT_USR:-1}" = 0 ] || signals="SlurmctldParameters=preempt_send_user_signal"
  cat >"$LAB/slurm.conf" <<CONF
ClusterName=test$P_CTLD
FirstJobId=$(($(date +%s) % 1000000 + 1000))
SlurmUser=$ME
SlurmdUser=$ME
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$P_CTLD
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket=$LAB/munge/sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$LAB/own/slurmctld.pid
SlurmdPidFile=$LAB/own/slurmd.%n.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$signals
JobRequeue=1
ReturnToService=2
KillWait=10
MinJobAge=7200
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
GresTypes=gpu
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=${GRACE:-60} State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
CONF
}

start() {
  local i
  check_names
  ls "$LAB"/pids/* >/dev/null 2>&1 && die "already started in $LAB: stop first"
  trap '[ $? = 0 ] || stop' EXIT
  umask 022
  mkdir -p "$LAB"/{state,spool,log,munge,pids,own}
  chmod 0755 "$LAB" "$LAB/munge"
  (umask 077 && head -c 1024 /dev/urandom >"$LAB/munge/key")
  write_conf
  write_nodes ${SLURM_FAKE:-$(nproc) 1000 0}
  spawn munged /usr/sbin/munged -F --key-file="$LAB/munge/key" --socket="$LAB/munge/sock" \
    --pid-file="$LAB/munge/pid" --log-file="$LAB/log/munged.log" --seed-file="$LAB/munge/seed"
  wait_for munge -S "$LAB/munge/sock" -n
  spawn slurmctld /usr/sbin/slurmctld -D -i
  wait_for scontrol ping
  for i in $(seq "$K"); do
    mkdir -p "$LAB/spool/n$i"
    spawn "slurmd$i" /usr/sbin/slurmd -D -N "n$i"
  done
  wait_for bash -c "[ \"\$(sinfo -h -p low -N -t idle -o %N | wc -l)\" = $K ]"
}

stop() { # jobs first, so that no step outlives slurmd; then our own pids, clients before servers
  local file pid
  if [ -s "$LAB/pids/slurmctld" ] && kill -0 "$(cat "$LAB/pids/slurmctld")" 2>/dev/null; then
    timeout 10 scancel -u "$ME" >/dev/null 2>&1 || true
    for _ in $(seq 80); do
      [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break
      sleep 0.25
    done
  fi
  for file in $(ls "$LAB"/pids/slurmd* 2>/dev/null) "$LAB"/pids/{slurmctld,munged}; do
    [ -s "$file" ] || continue
    pid=$(cat "$file")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 150); do
      { [ -d "/proc/$pid" ] && ! grep -q '^State:.Z' "/proc/$pid/status"; } 2>/dev/null || break
      sleep 0.1
    done
    rm -f "$file"
  done
}

case "${1:-start}" in
  start) start ;;
  stop) stop ;;
  status) sinfo -N && squeue ;;
  *) die "start, stop or status" ;;
esac
