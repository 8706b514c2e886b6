#!/usr/bin/env bash
# sbatch slurm/train.sh recipes/X.yaml --key value: the same launch/run.py as by hand, once on each node of the job.
# Submit from the checkout, which lies, as the run folder does, on a file system that all nodes share. What stands here
# can be said otherwise on sbatch's command line: sbatch --nodes=2 --gpus-per-node=4 slurm/train.sh recipes/X.yaml
#SBATCH --job-name=r1zero
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# The signal comes five minutes before the limit: the run writes a checkpoint, puts the job back into the queue, and goes
# on in the same run folder. preemption_grace, 240 s unless the recipe says otherwise, must be shorter than that.

# ---- this site: partition, account, modules, environment ----
##SBATCH --partition=
##SBATCH --account=
# module load cuda
python="${R1ZERO_PYTHON:-.venv/bin/python}"
# ---- end of this site ----

cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}" || exit 2
# A node that fails is the launcher's to report: Slurm must not kill the others before it has.
exec srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 \
    "$python" launch/run.py "$@"
