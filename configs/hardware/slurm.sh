#!/bin/bash
# Several nodes on SLURM, queued again until training has ended:
#
#     sbatch --nodes=4 configs/hardware/slurm.sh --config CONFIG --config configs/hardware/hsdp.yaml \
#         --trainer.num_nodes=4 --trainer.strategy.init_args.num_replicas=4 --run_dir=runs/emu
#
# Start it in the repository, on a file system that all nodes see. Five minutes before the time limit SLURM
# sends USR1 to this script, which sends TERM to every process of the training. They save between the same two
# steps and end with 143; the job is queued again, and goes on from there. A node that fails loses what came
# after the last checkpoint (--checkpoint.every_n_train_steps).
#SBATCH --job-name=emu
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
    kill -TERM "$training"
}
trap end_in_time USR1

# One process a GPU. Lightning takes ranks and the first node's address from SLURM.
srun --kill-on-bad-exit=1 python main.py fit "$@" --ckpt_path last &
training=$!
wait "$training" # ends when the signal comes, too
if [ "$ending" ]; then
    wait "$training"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
wait "$training"
