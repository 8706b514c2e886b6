#!/usr/bin/env bash
# sbatch slurm/evaluate.sh ARGUMENTS: the same launch/evaluate.py as by hand, on one node.
# Submit from the checkout. What stands here can be said otherwise on sbatch's command line.
#SBATCH --job-name=r1zero-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=slurm-%j.log

# ---- this site: partition, account, modules, environment ----
##SBATCH --partition=
##SBATCH --account=
# module load cuda
python="${R1ZERO_PYTHON:-.venv/bin/python}"
# ---- end of this site ----

cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}" || exit 2
exec srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$python" launch/evaluate.py "$@"
