r"""Algorithms of the literature as settings of one objective: each preset is a choice of critic, estimator, states and weights.

Everything is a call of `compose`; read a preset as the definition of the algorithm, and write your own the same way. All of them
sum log-densities and KL over state dimensions, and penalise the path KL in nats (`conversions` translates published constants).
"""

from ..advantages import Clip, centre, standardise_per_time
from ..critics import Critic, Target, ValueLoss, kl_to_go, log_ratio_to_go, returns, soft_error, squared_error
from ..estimators import (
    GradientBalance,
    LeanAdjoint,
    LikelihoodRatio,
    LogVariance,
    Matching,
    PathConsistency,
    Pathwise,
    WeightedLikelihood,
    discount_per_step,
    exponential_increment,
    exponential_return,
    last,
    late,
)
from ..estimators.likelihood_ratio import Normalise
from ..estimators.pathwise import Credit
from ..objective import Objective
from ..replay import Reference, ReplayBuffer
from ..values import AbstractValue, NoValue, X0RewardValue
from .compose import compose
from .training import Algorithm, Training

INFINITE = float("inf")
SQDF_DISCOUNT = discount_per_step(0.9)
"""As published, whatever the number of steps."""


def score_as_action(
    objective: Objective,
    value: AbstractValue,
    training: Training,
    *,
    clip: Clip = INFINITE,
    horizon: float = 0.0,
    target: Target = kl_to_go,
    normalise: Normalise | None = None,
    max_advantage: float = INFINITE,
    denoise_with_policy: bool = False,
) -> Algorithm:
    r"""Score as Action: continuous-time PPO (or TRPO) with increments of a learned value as advantages.

    `sum_j E[min(rho_j A_j, clip(rho_j) A_j)] - lambda sum_j E[kl_j]`, `A_j = V(t_{j+1}, x_{j+1}) - V(t_j, x_j) - lambda kl_j`; the
    value is regressed on the return to go at all times. TRPO is `Training(policy=NaturalGradient(radius), ...)`.

    Args:
        clip: the likelihood ratio is clipped to `1 +- clip`; inf is no clipping. Log-densities are *summed* over state
            dimensions, so usual values (0.1 to 0.3) apply, unlike in codes that average them.
        horizon: decay time of the advantages, control time (`objective.advantages`); 0, as published: single increments.
        target: of the value. `returns`, as published, has another fixed point than the maximiser of J when `kl_weight > 0`; the
            advantages pay the KL of their interval exactly if the target does.
        normalise: `standardise_per_time` as published, or `centre`, or None. Dividing changes the penalty relative to the reward.
        max_advantage: clamp of the advantages' magnitude, after normalisation (published: 5).
        denoise_with_policy: see `compose`.

    Deviations from the paper at the defaults: KL-to-go in the target; no standardisation and no clamp; log-ratios summed;
    `x_hat` of the value from the reference.

    ??? cite "Reference"
        ```bibtex
        @inproceedings{zhao2025score, title={Score as Action: Fine-Tuning Diffusion Generative Models by Continuous-time
          Reinforcement Learning}, author={Zhao, Hanyang and Chen, Haoxian and Zhang, Ji and Yao, David D. and Tang, Wenpin},
          booktitle={ICML}, year={2025}, eprint={2502.01819}}
        ```
    """
    estimator = LikelihoodRatio(horizon, clip, normalise, max_advantage, kl_to_go=target is not returns)
    critic = Critic(value, target)
    return compose(objective, estimator, critic, training, denoise_with_policy=denoise_with_policy)


def ddpo(objective: Objective, training: Training, *, clip: Clip = 0.2) -> Algorithm:
    r"""DDPO, importance-sampled: `sum_j min(rho_j A, clip(rho_j) A)` with `A = (r - mean r) / std r`; use `kl_weight = 0`.

    The objective `E r` has no maximiser in general: read its reward against its path KL. Black et al. 2024, section 4.3;
    log-ratios are summed over state dimensions (their code averages them), and the statistics are those of the batch, or
    under conditions of its paths of the same prompt (their code keeps them over iterations).

    ??? cite "Reference"
        ```bibtex
        @inproceedings{black2024ddpo, title={Training Diffusion Models with Reinforcement Learning},
          author={Black, Kevin and Janner, Michael and Du, Yilun and Kostrikov, Ilya and Levine, Sergey},
          booktitle={ICLR}, year={2024}}
        ```
    """
    return compose(objective, LikelihoodRatio(INFINITE, clip, standardise_per_time), no_critic(objective), training)


def dpok(objective: Objective, training: Training, *, clip: Clip = INFINITE) -> Algorithm:
    r"""DPOK: likelihood ratio of the return, with the path KL penalised: `A_j = r - lambda sum_{l >= j} kl_l`, less its batch mean.

    Fan et al. 2023, algorithm 1. Their gradient leaves out the KL of later steps, `kl_l` for `l > j`; it is part of the return
    here, as the maximiser of J needs. The baseline is the mean over the batch instead of a learned one.

    ??? cite "Reference"
        ```bibtex
        @inproceedings{fan2023dpok, title={DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models},
          author={Fan, Ying and Watkins, Olivia and Du, Yuqing and Liu, Hao and Ryu, Moonkyung and Boutilier, Craig and Abbeel,
          Pieter and Ghavamzadeh, Mohammad and Lee, Kangwook and Lee, Kimin}, booktitle={NeurIPS}, year={2023}}
        ```
    """
    return compose(objective, LikelihoodRatio(INFINITE, clip, centre), no_critic(objective), training)


def flow_grpo(objective: Objective, training: Training, *, clip: Clip = 0.2) -> Algorithm:
    r"""Flow-GRPO: `A = (r - mean r) / std r` within a group, clipped ratio, and the KL of each step as a penalty of its own.

    Liu et al. 2025, eq. 5 and 6. The group is the batch, or under conditions its paths of the same prompt; the KL enters by its own
    gradient only and not through the advantages, so that with `kl_weight > 0` its fixed point is not the maximiser of J. Dividing by
    the standard deviation makes the effective temperature `kl_weight std(r)`.

    ??? cite "Reference"
        ```bibtex
        @article{liu2025flowgrpo, title={Flow-GRPO: Training Flow Matching Models via Online RL}, author={Liu, Jie and Liu, Gongye and
          Liang, Jiajun and Li, Yangguang and Liu, Jiaheng and Wang, Xintao and Wan, Pengfei and Zhang, Di and Ouyang, Wanli},
          journal={arXiv:2505.05470}, year={2025}}
        ```
    """
    estimator = LikelihoodRatio(INFINITE, clip, standardise_per_time, kl_to_go=False)
    return compose(objective, estimator, no_critic(objective), training)


def vard(
    objective: Objective,
    value: AbstractValue,
    training: Training,
    *,
    target: Target = returns,
    loss: ValueLoss = squared_error,
    steps: int = 1,
    frozen: bool = False,
) -> Algorithm:
    r"""VARD: a learned value of intermediate states, and the gradient through one step of the sampler into it.

    A reconstruction, since the paper's loss is not public in code: the value minimises `E (V(t, x_t) - r(X_T))^2`, the policy
    `E[-V(t', x'(theta)) + lambda kl]` over steps from on-policy states. What the paper leaves open is an argument: the `target` and
    `loss` (`returns`, `squared_error`: the arithmetic mean, whose fixed point is not J's maximiser; `log_ratio_to_go`,
    `soft_error`: the soft value, whose fixed point is), the number of `steps`, whether the value sees the noisy or the denoised state
    (`PlainValue`, `StructuredValue(denoised=...)`), `frozen` or refreshed. A black-box reward needs `PlainValue`.

    ??? cite "Reference"
        ```bibtex
        @article{dai2025vard, title={VARD: Efficient and Dense Fine-Tuning for Diffusion Models with Value-based RL},
          author={Dai, Fengyuan and Li, Zifeng and others}, journal={arXiv:2505.15791}, year={2025}}
        ```
    """
    return compose(objective, Pathwise(steps), Critic(value, target, loss, frozen=frozen), training)


def soft_vard(objective: Objective, value: AbstractValue, training: Training) -> Algorithm:
    """`vard` with the soft value `lambda log E^ref exp(r / lambda)` as critic: its fixed point is the maximiser of J."""
    return vard(objective, value, training, target=log_ratio_to_go, loss=soft_error)


def sqdf(
    objective: Objective, training: Training, *, discount: Credit = SQDF_DISCOUNT, capacity: int | None = None
) -> Algorithm:
    r"""SQDF: the gradient of the reward of the x0 prediction after one step, discounted, from replayed states.

    `E[-w r(x_hat(t', x'(theta))) + lambda kl]` with the discount `w = 0.9^(steps to go)`. `x_hat` is `Objective(x0_prediction=...)`: the
    posterior mean, or `few_step_ode(1)` in the place of the paper's consistency model. The discount makes the temperature depend on
    time, so its fixed point is not `p_ref exp(r/lambda)`. The paper discounts each of its 50 steps. With another number of steps,
    `estimators.discount_per_time((t1 - t0) / (50 ln(1/0.9)))` discounts as much in the same time. `capacity` paths are kept
    (default: eight batches), first in first out.
    `conversions.sqdf_kl_weight` translates the paper's alpha.

    ??? cite "Reference"
        ```bibtex
        @article{sqdf2025, title={Diffusion Fine-Tuning via Reparameterized Policy Gradient of the Soft Q-Function},
          author={Kang, Hyeongyu and others}, journal={arXiv:2512.04559}, year={2025}}
        ```
    """
    buffer = ReplayBuffer(8 * training.batch if capacity is None else capacity)
    return compose(objective, Pathwise(1, credit=discount), x0_reward_critic(objective), training, behaviour=buffer)


def draft(objective: Objective, training: Training, *, steps: int | None = None, small_memory: bool = False) -> Algorithm:
    r"""DRaFT-K: `-E r(X_T)` differentiated through the last `steps` steps of the sampler; `None`: through all of them (DRaFT).

    Clark et al. 2024, algorithm 1. Published without a penalty (`kl_weight = 0`); with one, the KL of these steps is charged.

    ??? cite "Reference"
        ```bibtex
        @inproceedings{clark2024draft, title={Directly Fine-Tuning Diffusion Models on Differentiable Rewards},
          author={Clark, Kevin and Vicol, Paul and Swersky, Kevin and Fleet, David J.}, booktitle={ICLR}, year={2024}}
        ```
    """
    k = objective.intervals if steps is None else steps
    estimator = Pathwise(k, last(k), small_memory=small_memory)
    return compose(objective, estimator, x0_reward_critic(objective), training)


def alignprop(objective: Objective, training: Training) -> Algorithm:
    r"""AlignProp: DRaFT through the whole chain, with steps recomputed to save memory.

    Prabhudesai et al. 2023. Their random truncation of the chain is left out: `draft(steps=K)` truncates at a fixed K.

    ??? cite "Reference"
        ```bibtex
        @article{prabhudesai2023alignprop, title={Aligning Text-to-Image Diffusion Models with Reward Backpropagation},
          author={Prabhudesai, Mihir and Goyal, Anirudh and Pathak, Deepak and Fragkiadaki, Katerina},
          journal={arXiv:2310.03739}, year={2023}}
        ```
    """
    return draft(objective, training, small_memory=True)


def refl(objective: Objective, training: Training, *, fraction: float = 0.25) -> Algorithm:
    r"""ReFL: the reward of the policy's own posterior mean at a late time, `-E r(x_hat_theta(t_j, x_j))`, `t_j` in the last `fraction`.

    Xu et al. 2023, algorithm 1. All late times are used instead of one at random; their reward map (a ReLU) is left out.

    ??? cite "Reference"
        ```bibtex
        @inproceedings{xu2023imagereward, title={ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation},
          author={Xu, Jiazheng and Liu, Xiao and Wu, Yuchen and Tong, Yuxuan and Li, Qinkai and Ding, Ming and Tang, Jie and Dong, Yuxiao},
          booktitle={NeurIPS}, year={2023}}
        ```
    """
    return compose(objective, Pathwise(0, late(fraction)), x0_reward_critic(objective), training)


def adjoint_matching(objective: Objective, training: Training, *, horizon: float = INFINITE) -> Algorithm:
    r"""Adjoint Matching: the control is regressed on minus the noise level times the lean adjoint along its own paths.

    `E sum_j |u_theta + sigma a_{j+1}|^2 / 2`; Domingo-Enrich et al. 2025, eq. 37 to 39. Needs a differentiable reward and `eta = 1`
    for the optimum to be the reweighted law. The adjoint is that of the chain's own steps (the paper: an Euler step), and the
    adjoint at the end of a step is used, which is exact for the chain. All steps are used, and none is clipped. A finite `horizon`
    (control time) bootstraps the adjoint from the policy itself: the same fixed point with less noise (`estimators.LeanAdjoint`).

    ??? cite "Reference"
        ```bibtex
        @inproceedings{domingoenrich2025adjoint, title={Adjoint Matching: Fine-tuning Flow and Diffusion Generative Models with
          Memoryless Stochastic Optimal Control}, author={Domingo-Enrich, Carles and Drozdzal, Michal and Karrer, Brian and
          Chen, Ricky T. Q.}, booktitle={ICLR}, year={2025}}
        ```
    """
    return compose(objective, Matching(LeanAdjoint(horizon)), no_critic(objective), training)


def rwr(objective: Objective, training: Training) -> Algorithm:
    r"""Reward-weighted regression: maximum likelihood on the reference's paths, weighted with `exp(r / lambda)`.

    Peters and Schaal 2007; Lee et al. 2023 for diffusion. In one stage (states of the reference, as here) the fixed point is the optimal
    policy; repeated on the policy's own paths the temperature would fall with every repetition.

    ??? cite "Reference"
        ```bibtex
        @inproceedings{peters2007rwr, title={Reinforcement Learning by Reward-Weighted Regression for Operational Space Control},
          author={Peters, Jan and Schaal, Stefan}, booktitle={ICML}, year={2007}}
        ```
    """
    estimator = WeightedLikelihood(exponential_return)
    return compose(objective, estimator, no_critic(objective), training, behaviour=Reference())


def vidd(objective: Objective, training: Training) -> Algorithm:
    r"""VIDD: distil the soft-optimal step of an approximate value, weights `exp((r(x_hat(t', x')) - r(x_hat(t, x))) / lambda)`.

    Su et al. 2025: forward KL to `p_ref(x' | x) exp(V(t', x') / lambda)`, with the posterior mean's reward as value. Roll-in is by the
    reference here, so the weights need no likelihood ratio; the paper mixes in the policy's own states.

    ??? cite "Reference"
        ```bibtex
        @article{su2025vidd, title={Iterative Distillation for Reward-Guided Fine-Tuning of Diffusion Models in Biomolecular Design},
          author={Su, Xingyu and Li, Xiner and Uehara, Masatoshi and others}, journal={arXiv:2507.00445}, year={2025}}
        ```
    """
    estimator = WeightedLikelihood(exponential_increment)
    return compose(objective, estimator, x0_reward_critic(objective), training, behaviour=Reference())


def log_variance(objective: Objective, training: Training) -> Algorithm:
    r"""Log-variance divergence (VarGrad): `Var(r - costs - lambda log dP^a/dP^ref) / (2 lambda)` over the policy's own paths.

    Nuesken and Richter 2021; Richter and Berner 2024 for sampling. Needs a fixed or a forgotten start.

    ??? cite "Reference"
        ```bibtex
        @article{nuesken2021logvariance, title={Solving high-dimensional Hamilton-Jacobi-Bellman PDEs using neural networks:
          perspectives from the theory of controlled diffusions and measures on path space}, author={N{\"u}sken, Nikolas and
          Richter, Lorenz}, journal={Partial Differential Equations and Applications}, year={2021}}
        ```
    """
    return compose(objective, LogVariance(), no_critic(objective), training)


def path_consistency(objective: Objective, value: AbstractValue, training: Training, *, span: int | None = None) -> Algorithm:
    r"""Path consistency: the identity of the optimal law on windows of `span` intervals, with a learned soft value.

    Nachum et al. 2017, eq. 13; on the rest of the path (`span=None`) it is the log-variance with a baseline at every state. The value
    is regressed on the realised `log_ratio_to_go`, which at the optimum has no variance.

    ??? cite "Reference"
        ```bibtex
        @inproceedings{nachum2017pcl, title={Bridging the Gap Between Value and Policy Based Reinforcement Learning},
          author={Nachum, Ofir and Norouzi, Mohammad and Xu, Kelvin and Schuurmans, Dale}, booktitle={NeurIPS}, year={2017}}
        ```
    """
    return compose(objective, PathConsistency(span), Critic(value, log_ratio_to_go), training)


def nabla_db(objective: Objective, value: AbstractValue, training: Training) -> Algorithm:
    r"""Residual nabla-DB: detailed balance of the optimal law, differentiated in both ends of a step.

    Liu et al. 2025. Deviations: the residual flow's score is the gradient of a scalar (structured) value over lambda; the policy follows
    the forward residual and the value the reverse one (the paper sums both for both); no clipping of gradients by time.

    ??? cite "Reference"
        ```bibtex
        @inproceedings{liu2025nabladb, title={Efficient Diversity-Preserving Diffusion Alignment via Gradient-Informed GFlowNets},
          author={Liu, Zhen and Xiao, Tim Z. and Liu, Weiyang and Bengio, Yoshua and Zhang, Dinghuai}, booktitle={ICLR}, year={2025},
          eprint={2412.07775}}
        ```
    """
    return compose(objective, GradientBalance(), Critic(value, log_ratio_to_go), training)


def no_critic(objective: Objective) -> Critic:
    """No value: returns speak for themselves."""
    return Critic(NoValue(objective.sampler.process.t0, objective.sampler.process.t1))


def x0_reward_critic(objective: Objective) -> Critic:
    """The reward of `objective.x0_prediction`, not learned."""
    return Critic(X0RewardValue(objective.sampler.process.t0, objective.sampler.process.t1))
