#!/bin/bash
# A sweep on SLURM: one agent for an allocation, one run at a time over all of its nodes.
#
#     sbatch --nodes=2 sweeps/slurm.sh wandb agent --forward-signals --count 1 ENTITY/PROJECT/SWEEP
#     sbatch --nodes=2 sweeps/slurm.sh emu sweep sweeps/emu_set_size.yaml          (no server)
#
# The first may be submitted as often as there are runs, and runs at the same time; the second once. The command of
# each sweeps/emu_*.yaml starts one process a GPU with srun. Start it in the repository, on a file system that all nodes
# see. Five minutes before the time limit the agent is told to end and tells the run, which saves; then the job is
# queued again, and the same command goes on.
#SBATCH --job-name=emu-sweep
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

end_in_time() {
    ending=yes
    kill -TERM "$agent"
}
trap end_in_time USR1

"$@" &
agent=$!
wait "$agent" # ends when the signal comes, too
code=$?
if [ "$ending" ]; then
    wait "$agent"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit $code
