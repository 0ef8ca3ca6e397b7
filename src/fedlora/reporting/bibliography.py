"""Papers behind settings that are no class of their own, as BibTeX; facts as their modules' docstrings have them."""

PRIVACY = {
    "example": r"""@inproceedings{abadi2016dpsgd, title = {Deep Learning with Differential Privacy},
      author = {Abadi and others}, booktitle = {CCS}, year = {2016}, eprint = {1607.00133},
      archiveprefix = {arXiv}}""",
    "client": r"""@inproceedings{mcmahan2018dp, title = {Learning Differentially Private Recurrent Language Models},
      author = {McMahan and Ramage and Talwar and Zhang}, booktitle = {ICLR}, year = {2018},
      eprint = {1710.06963}, archiveprefix = {arXiv}}""",
}
ACCOUNTANTS = {
    "prv": r"""@inproceedings{gopi2021numerical, title = {Numerical Composition of Differential Privacy},
      author = {Gopi and Lee and Wutschitz}, booktitle = {NeurIPS}, year = {2021}, eprint = {2106.02848},
      archiveprefix = {arXiv}}""",
    "rdp": r"""@misc{mironov2019renyi, title = {{R{\'e}nyi} Differential Privacy of the Sampled {Gaussian} Mechanism},
      author = {Mironov and Talwar and Zhang}, year = {2019}, eprint = {1908.10530}, archiveprefix = {arXiv}}""",
}
REDDI = """@inproceedings{reddi2021adaptive, title = {Adaptive Federated Optimization}, author = {Reddi and others},
  booktitle = {ICLR}, year = {2021}, eprint = {2003.00295}, archiveprefix = {arXiv}}"""
OPTIMIZERS = {
    "momentum": """@misc{hsu2019measuring,
      title = {Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification},
      author = {Hsu and others}, year = {2019}, eprint = {1909.06335}, archiveprefix = {arXiv}}""",
    "adam": REDDI,
    "yogi": REDDI,
}
SECURE_AGGREGATION = """@inproceedings{bonawitz2017secure,
  title = {Practical Secure Aggregation for Privacy-Preserving Machine Learning},
  author = {Bonawitz and others}, booktitle = {CCS}, year = {2017}, doi = {10.1145/3133956.3133982}}"""
